import hashlib
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from PIL import Image

from breedline.errors import BreedlineError
from breedline.params import Params
from breedline.shards import COLUMNS, pack, write_index
from breedline.tables import read_csv, write_csv
from stages.label import label

FILES = ("labels.csv", "rejected.csv", "classes.csv", "label.json")
Run = Callable[..., SimpleNamespace]
BYTES_PER_IMAGE = 600
"""More than the name and the SHA-256 as text (210 bytes) twice, and some columns."""
HEADER = "name,sha256,action,label,reason\n"


def png(number: int) -> bytes:
    """A picture that differs for each number."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def pets(count: int = 20) -> dict[str, bytes]:
    return {
        f"pets/{breed}_{n}.jpg": png(1000 * (breed == "pug") + n)
        for breed in ("pug", "saint_bernard")
        for n in range(count)
    }


@pytest.fixture
def run(defaults: Params) -> Run:
    """A function that labels {path: content} and gives the tables that come out."""

    def go(
        files: dict[str, bytes], corrections: str = "", near: list[tuple[str, str]] | None = None, **settings: Any
    ) -> SimpleNamespace:
        raw = Path("raw")
        raw.mkdir(exist_ok=True)
        entries = list(pack(((name, len(c), io.BytesIO(c)) for name, c in files.items()), raw, "00"))
        write_index(pd.DataFrame(entries, columns=COLUMNS), raw)
        Path("corrections.csv").write_text(HEADER + corrections)
        sha256 = {entry.name: entry.sha256 for entry in entries}
        pairs = [(sha256[name], sha256[leader]) for name, leader in near or []]
        write_csv(pd.DataFrame(pairs, columns=["sha256", "leader"]), Path("duplicates.csv"))
        default = {"pattern": r"(?P<label>.+)_\d+\.jpg", "classes": None, "min_per_class": 2}
        label(
            defaults.label.model_copy(update=default | settings),
            raw,
            Path("corrections.csv"),
            Path("duplicates.csv"),
            labels=Path("labels.csv"),
            rejected=Path("rejected.csv"),
            classes=Path("classes.csv"),
            metrics=Path("label.json"),
        )
        return SimpleNamespace(
            labels=read_csv(Path("labels.csv"), ["name", "label", "split", "sha256", "size"]),
            rejected=read_csv(Path("rejected.csv"), ["name", "sha256", "reason", "detail"]),
            classes=pd.read_csv("classes.csv", keep_default_na=False).set_index("class"),
            metrics=json.loads(Path("label.json").read_text()),
            raw=read_csv(raw / "index.csv", COLUMNS).set_index("name"),
        )

    return go


def test_labels_come_from_names(run: Run) -> None:
    out = run(pets())
    assert out.labels["label"].value_counts().to_dict() == {"pug": 20, "saint_bernard": 20}
    assert out.labels["name"].tolist() == list(pets())
    assert out.metrics["images"] == 40
    assert sum(out.metrics["split"].values()) == 40
    assert list(out.classes.columns) == ["train", "valid", "test"]
    assert out.classes.loc["pug"].min() > 0


def test_how_many_images_a_class_has_is_a_table_not_a_metric(run: Run) -> None:
    out = run({f"{name}_{n}.jpg": png(100 * i + n) for i, name in enumerate(("b", "=a", "NA")) for n in range(9)})
    assert list(out.classes.index) == ["'=a", "NA", "b"]  # sorted; the apostrophe keeps a spreadsheet from running it
    counted = out.labels.groupby(["label", "split"]).size().unstack(fill_value=0)
    assert out.classes.to_numpy().tolist() == counted[["train", "valid", "test"]].to_numpy().tolist()
    assert out.metrics["split"] == out.classes.sum().to_dict()
    assert out.metrics.keys() == {
        "images",
        "classes",
        "duplicates",
        "near_duplicates",
        "split",
        "rejected",
        "corrections",
    }


def test_every_split_is_a_column_even_where_it_is_empty(run: Run) -> None:
    out = run(pets(), test_pct=0.0)
    assert list(out.classes.columns) == ["train", "valid", "test"]
    assert out.classes["test"].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:.*tracemalloc")
def test_an_image_takes_little_memory(run: Run, defaults: Params) -> None:
    count = 20_000
    Path("raw").mkdir()
    Path("raw/00-00000.tar").touch()
    shas = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(count)]
    rows = [(f"pets/breed_{n % 37}_of_the_world_{n}.jpg", "00-00000.tar", 0, 0, shas[n], "JPEG") for n in range(count)]
    write_index(pd.DataFrame(rows, columns=COLUMNS), Path("raw"))
    Path("corrections.csv").write_text(HEADER)
    Path("duplicates.csv").write_text(
        "sha256,leader\n" + "".join(f"{a},{b}\n" for a, b in zip(shas[1::2], shas[::2], strict=True))
    )
    settings = defaults.label.model_copy(update={"pattern": r"(?P<label>.+)_\d+\.jpg", "classes": 37})
    outputs = {name: Path(f"{name}.out") for name in ("labels", "rejected", "classes", "metrics")}
    del rows, shas
    tracemalloc.start()
    label(settings, Path("raw"), Path("corrections.csv"), Path("duplicates.csv"), **outputs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / count < BYTES_PER_IMAGE


def test_equal_inputs_give_equal_bytes(run: Run) -> None:
    run(pets())
    first = [Path(name).read_bytes() for name in FILES]
    run(pets())
    assert [Path(name).read_bytes() for name in FILES] == first


def test_a_label_may_say_what_pandas_takes_for_nothing(run: Run) -> None:
    out = run(
        {f"{name}_{n}.jpg": png(100 * i + n) for i, name in enumerate(("NA", "null", "007", "1.0")) for n in range(4)}
    )
    assert set(out.labels["label"]) == {"NA", "null", "007", "1.0"}


def test_the_folder_can_be_the_label(run: Run) -> None:
    files = {f"data/{name}/{n}.png": png(100 * i + n) for i, name in enumerate(("cat", "dog")) for n in range(4)}
    out = run(files, pattern=r"data/(?P<label>[^/]+)/.*", on="path")
    assert out.labels["label"].tolist() == ["cat"] * 4 + ["dog"] * 4


def test_labels_come_from_a_table(run: Run) -> None:
    files = {f"{n}.jpg": png(n) for n in range(6)}
    table = "label,name,more\n" + "".join(f"{'ab'[n % 2]},{n}.jpg,x\n" for n in range(5))
    out = run(files | {"train.csv": table.encode()}, pattern=None, table="train.csv", max_rejected_pct=20)
    assert out.labels["label"].tolist() == list("ababa")
    assert out.rejected[["name", "reason"]].to_numpy().tolist() == [["5.jpg", "no label"]]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (b"name,label\n1.jpg,a\n1.jpg,b\n", "names .'1.jpg'. more than once"),
        (b"file,label\n1.jpg,a\n", "lacks the column name; it has file, label"),
        (b"", "is not a CSV table"),
        (None, r"'train.csv' is not among the downloaded files; there are \['notes.txt'\]"),
    ],
)
def test_a_bad_table_is_refused(run: Run, table: bytes | None, expected: str) -> None:
    files = pets() | ({"train.csv": table} if table is not None else {"notes.txt": b"-"})
    with pytest.raises(BreedlineError, match=expected):
        run(files, pattern=None, table="train.csv")


def test_labels_can_be_renamed_and_merged(run: Run) -> None:
    out = run(pets() | {"mops_1.jpg": png(9000)}, map={"mops": "pug"}, classes=["pug", "saint_bernard"])
    assert out.classes.loc["pug"].sum() == 21


def test_every_reject_has_its_reason(run: Run) -> None:
    odd = {"readme.jpg": png(7000), "pug_9.jpg": b"<html>", "pug_70.jpg": png(8000), "saint_bernard_70.jpg": png(8000)}
    out = run(pets() | odd, max_rejected_pct=50)
    assert out.rejected[["name", "reason"]].to_numpy().tolist() == [
        ["readme.jpg", "no label"],
        ["pug_9.jpg", "not an image"],
        ["pug_70.jpg", "conflicting labels"],
        ["saint_bernard_70.jpg", "conflicting labels"],
    ]
    assert out.metrics["rejected"] == {
        "not_an_image": 1,
        "no_label": 1,
        "conflicting_labels": 2,
        "dropped_by_correction": 0,
    }


def test_equal_images_with_equal_labels_stay_and_fall_on_one_side(run: Run) -> None:
    out = run(pets() | {f"pug_{n + 100}.jpg": png(1000 + n) for n in range(20)})
    assert out.metrics["duplicates"] == 20
    assert (out.labels.groupby("sha256")["split"].nunique() == 1).all()


def test_corrections_relabel_and_drop_by_content(run: Run) -> None:
    raw = run(pets() | {"nothing.jpg": png(7000)}, max_rejected_pct=5).raw["sha256"]
    lines = [
        f"renamed since.jpg,{raw['pets/pug_0.jpg']},relabel,saint_bernard,",
        f"x,{raw['pets/pug_1.jpg']},drop,,two animals",
        f"nothing.jpg,{raw['nothing.jpg']},relabel,pug,",
        f"gone.jpg,{'0' * 64},drop,,",
    ]
    out = run(pets() | {"nothing.jpg": png(7000)}, "\n".join(lines) + "\n", max_rejected_pct=0)
    labels = out.labels.set_index("name")["label"]
    assert labels["pets/pug_0.jpg"] == "saint_bernard"
    assert labels["nothing.jpg"] == "pug"
    assert out.rejected.drop(columns="sha256").to_numpy().tolist() == [
        ["pets/pug_1.jpg", "dropped by correction", "two animals"]
    ]
    assert out.metrics["corrections"] == {"applied": 3, "unmatched": 1}


def test_people_who_decide_the_same_are_one_decision(run: Run) -> None:
    """So git may merge their files line by line."""
    sha256 = run(pets()).raw["sha256"]["pets/pug_1.jpg"]
    out = run(pets(), f"pets/pug_1.jpg,{sha256},drop,,blurred\npug_1.jpg,{sha256.upper()},drop,,two animals\n")
    assert out.rejected[["name", "detail"]].to_numpy().tolist() == [["pets/pug_1.jpg", "blurred"]]
    assert out.metrics["corrections"] == {"applied": 1, "unmatched": 0}


def test_a_sha256_in_upper_case_matches_and_each_correction_that_matches_nothing_is_named(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    raw = run(pets()).raw["sha256"]
    lines = [
        f"pug_0.jpg,{raw['pets/pug_0.jpg'].upper()},relabel,saint_bernard,",
        "",
        f"pug_1.jpg,{raw['pets/pug_1.jpg'][:12]},drop,,two animals",
        f'"a\nb.jpg",{"0" * 64},drop,,',
        f"pug_2.jpg, {raw['pets/pug_2.jpg']} ,drop,,",
    ]
    out = run(pets(), "\n".join(lines) + "\n")
    assert out.labels.set_index("name")["label"]["pets/pug_0.jpg"] == "saint_bernard"
    assert out.metrics["corrections"] == {"applied": 2, "unmatched": 2}
    assert out.rejected["name"].tolist() == ["pets/pug_2.jpg"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"label: corrections.csv, line 4 ('pug_1.jpg'): no image has the sha256 '{raw['pets/pug_1.jpg'][:12]}'; "
        "labels.csv has all 64 digits of each",
        f"label: corrections.csv, line 5 ('a\\nb.jpg'): no image has the sha256 '{'0' * 64}'; "
        "labels.csv has all 64 digits of each",
    ]


def test_two_decisions_on_one_image_are_refused_whatever_the_case(run: Run) -> None:
    with pytest.raises(BreedlineError, match="has more than one decision"):
        run(pets(), "a,ab,drop,,\na,AB,relabel,pug,\n")


def test_corrections_that_drop_every_image_are_refused(run: Run) -> None:
    raw = run(pets()).raw["sha256"]
    Path("labels.csv").unlink()
    with pytest.raises(BreedlineError, match=r"^corrections\.csv drops every image that has a label: remove some"):
        run(pets() | {"readme.jpg": png(7000)}, "".join(f"x,{sha256},drop,,\n" for sha256 in raw), max_rejected_pct=99)
    assert not Path("labels.csv").exists()


def test_a_correction_settles_a_conflict(run: Run) -> None:
    files = pets() | {"pug_70.jpg": png(8000), "saint_bernard_70.jpg": png(8000)}
    sha256 = run(files, max_rejected_pct=10).raw["sha256"]["pug_70.jpg"]
    out = run(files, f"pug_70.jpg,{sha256},relabel,pug,\n", max_rejected_pct=0)
    assert out.labels.set_index("name").loc[["pug_70.jpg", "saint_bernard_70.jpg"], "label"].tolist() == ["pug", "pug"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a,1,rename,x,", "line 2: action 'rename'"),
        ("a,1,relabel,,", "write relabel and a label"),
        ("a,1,drop,x,", "or drop and none"),
        ('"a\nb",1,drop,,\n\na,2,drop,x,', "line 5: action 'drop'"),
        ("a,1,drop,,\nb,2,drop,,\na,1,relabel,x,", "more than one decision on 'a': leave one of the lines 2 and 4"),
    ],
)
def test_a_correction_that_makes_no_sense_is_refused(run: Run, line: str, expected: str) -> None:
    with pytest.raises(BreedlineError, match=expected):
        run(pets(), line + "\n")


@pytest.mark.parametrize("form", ["pets/pug_3.jpg", "pug_3.jpg", "pug_3", "pug_3 1 1 1"])
def test_a_list_can_fix_the_test_split(run: Run, form: str) -> None:
    out = run(pets() | {"test.txt": f"# the official one\n{form}\n".encode()}, test_list="test.txt")
    assert out.labels.loc[out.labels["split"] == "test", "name"].tolist() == ["pets/pug_3.jpg"]
    assert "valid" in set(out.labels["split"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pattern": r"(?P<label>.+)_\d+\.png"}, "no image has a label: 'pets/pug_0.jpg' is 'no label'"),
        (
            {"pattern": r"(?P<label>pug)_\d+\.jpg"},
            r"20 of 40 files \(50.0 %\) are rejected.*saint_bernard_0.jpg: no label",
        ),
        ({"pattern": r"(?P<label>.).*\.jpg", "map": {"s": "p"}}, "every image is 'p'"),
        ({"classes": 37}, "expects 37 classes, the names give 2: pug, saint_bernard"),
        ({"classes": ["pug", "cat"]}, "lacks: saint_bernard; classes there that no image has: cat"),
        ({"min_per_class": 21}, r"fewer than label.min_per_class = 21 images: pug \(20\), saint_bernard \(20\)"),
        ({"test_list": "pets/none.txt"}, "is not among the downloaded files"),
    ],
)
def test_what_cannot_be_right_is_refused_with_examples(run: Run, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(BreedlineError, match=expected):
        run(pets(), **settings)
    assert not Path("labels.csv").exists()


def test_a_list_that_names_nothing_is_refused(run: Run) -> None:
    with pytest.raises(BreedlineError, match=r"names none of the images, such as pets/pug_0\.jpg"):
        run(pets() | {"test.txt": b"cat_1\n"}, test_list="test.txt")


def test_near_duplicates_stand_on_one_side_and_those_who_moved_are_counted(run: Run) -> None:
    alone = run(pets()).labels.set_index("name")["split"]
    near = [(f"pets/pug_{n}.jpg", "pets/pug_0.jpg") for n in range(1, 8)]
    near.append(("pets/pug_9.jpg", "pets/saint_bernard_9.jpg"))
    out = run(pets(), near=near)
    split = out.labels.set_index("name")["split"]
    assert all(split[name] == split[leader] for name, leader in near)
    assert out.metrics["near_duplicates"] == {
        "groups": 2,
        "images": 10,
        "beside_test": 0,
        "moved": int((split != alone).sum()),
    }
    assert out.metrics["near_duplicates"]["moved"] > 0
    none = {"groups": 0, "images": 0, "beside_test": 0, "moved": 0}
    assert run(pets()).metrics["near_duplicates"] == none


def test_what_has_no_label_counts_as_no_near_duplicate_but_leads_all_the_same(run: Run) -> None:
    near = [(f"pets/pug_{n}.jpg", "pets/pug_0.jpg") for n in range(1, 4)]
    near.append(("pets/saint_bernard_1.jpg", "pets/saint_bernard_0.jpg"))
    before = run(pets(), near=near)
    sha256 = before.raw["sha256"]
    dropped = [f"x,{sha256[f'pets/{name}_0.jpg']},drop,,blurred\n" for name in ("pug", "saint_bernard")]
    after = run(pets(), "".join(dropped), near)
    members = [name for name, _ in near]
    assert (
        after.labels.set_index("name")["split"][members].tolist()
        == before.labels.set_index("name")["split"][members].tolist()
    )
    assert (after.metrics["near_duplicates"]["groups"], after.metrics["near_duplicates"]["images"]) == (1, 3)


def test_near_duplicates_of_a_listed_test_image_stay_out_of_test_and_are_warned_of(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    near = [(f"pets/pug_{n}.jpg", "pets/pug_0.jpg") for n in range(1, 4)]
    out = run(pets() | {"test.txt": b"pug_2\nsaint_bernard_1\n"}, near=near, test_list="test.txt")
    tested = out.labels.loc[out.labels["split"] == "test", "name"].tolist()
    assert tested == ["pets/pug_2.jpg", "pets/saint_bernard_1.jpg"]
    assert out.metrics["near_duplicates"]["beside_test"] == 3
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "label: 3 images that label.test_list does not name are near-duplicates of some that it names, and stay out of "
        "test: pets/pug_0.jpg, pets/pug_1.jpg, pets/pug_3.jpg; to train without them, drop them by data/corrections.csv"
    ]
