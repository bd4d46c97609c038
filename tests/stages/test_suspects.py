import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from breedline.errors import BreedlineError
from breedline.tables import read_csv, write_csv
from stages.suspects import suspects

Pipeline = Any
COLUMNS = (
    "name,sha256,split,label,suggested,label_probability,suggested_probability,score,likely,like_label,like_suggested"
)
PAIRS = "name,sha256,split,label,other_name,other_sha256,other_split,other_label,similarity"


def run(pipeline: Pipeline, folder: Path, labels: Path | None = None, **settings: Any) -> tuple[pd.DataFrame, Any]:
    suspects(
        pipeline.params.suspects.model_copy(update=settings),
        pipeline.path("presized"),
        labels or pipeline.path("labels.csv"),
        pipeline.path("weights"),
        pipeline.params.train.arch,
        32,
        40,
        suspects=folder / "suspects.csv",
        near_duplicates=folder / "near_duplicates.csv",
        metrics=folder / "suspects.json",
    )
    table = read_csv(folder / "suspects.csv", COLUMNS.split(","))
    return table, json.loads((folder / "suspects.json").read_text())


def table_of(pipeline: Pipeline) -> pd.DataFrame:
    return read_csv(pipeline.path("labels.csv"), ["name", "label", "split", "sha256"])


@pytest.mark.parametrize("kind", ["pipeline", "pretrained"])
def test_flipped_labels_of_every_split_are_found(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pipeline = request.getfixturevalue(kind)
    labels = table_of(pipeline)
    flipped = labels.groupby("split").head(2).index
    true = labels.loc[flipped, ["name", "label"]].set_index("name")["label"]
    labels.loc[flipped, "label"] = labels.loc[flipped, "label"].map({"red": "blue", "green": "red", "blue": "green"})
    write_csv(labels, tmp_path / "labels.csv")
    found, numbers = run(pipeline, tmp_path, tmp_path / "labels.csv")
    assert ",".join(found) == COLUMNS
    worst = found.head(6)
    assert set(worst["name"]) == set(true.index)
    assert worst["suggested"].tolist() == true[worst["name"]].tolist()
    assert numbers["likely"] == 6
    assert [numbers[split]["likely"] for split in ("train", "valid", "test")] == [2, 2, 2]
    assert (found["likely"] == "True").tolist() == [True] * 6 + [False] * (len(found) - 6)
    by_hash = labels.set_index("sha256")["label"]
    for row in found.to_dict("records"):
        for column in ("label", "suggested"):
            like = row[f"like_{column}"].split(" ")
            assert len(like) == 3
            assert {by_hash[one] for one in like} == {row[column]}
            assert row["sha256"] not in like


def test_a_table_ends_where_it_is_told_but_all_are_counted(pipeline: Pipeline, tmp_path: Path) -> None:
    every, numbers = run(pipeline, tmp_path / "every")
    few, same = run(pipeline, tmp_path / "few", most=4)
    assert few.equals(every.head(4))
    assert numbers == same
    assert numbers["images"] == len(every) == 180


@pytest.mark.parametrize("kind", ["pipeline", "pretrained"])
def test_equal_inputs_give_equal_bytes(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        run(request.getfixturevalue(kind), tmp_path / folder)
    for name in ("suspects.csv", "near_duplicates.csv", "suspects.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_labels_and_names_are_text_and_equal_content_is_one_image(pipeline: Pipeline, tmp_path: Path) -> None:
    ugly = {"red": '=1+1, "red"', "green": "[b]green\n, x", "blue": "NA"}
    labels = table_of(pipeline)
    labels["label"] = labels["label"].map(ugly)
    labels.loc[0, "name"] = '-"a, b".jpg'
    labels = pd.concat([labels, labels.head(3).assign(name=["copy 1", "copy 2", "copy 3"])], ignore_index=True)
    write_csv(labels, tmp_path / "labels.csv")
    found, numbers = run(pipeline, tmp_path, tmp_path / "labels.csv")
    assert numbers["images"] == len(found) == 180
    assert set(found["label"]) == set(ugly.values())
    assert '-"a, b".jpg' in set(found["name"])
    assert not found["name"].str.startswith("copy").any()


def test_a_class_in_one_split_and_classes_of_one_image(pipeline: Pipeline, tmp_path: Path) -> None:
    labels = table_of(pipeline)
    labels.loc[(labels["label"] == "red") & (labels["split"] != "test"), "label"] = "green"
    labels.loc[labels[labels["label"] == "blue"].index[0], "label"] = "lonely"
    write_csv(labels, tmp_path / "labels.csv")
    found, _ = run(pipeline, tmp_path, tmp_path / "labels.csv")
    assert set(found["label"]) == {"red", "green", "blue"}


def test_near_duplicates_that_contradict_each_other(pipeline: Pipeline, tmp_path: Path, monkeypatch: Any) -> None:
    seen = []

    def all_confirmed(pairs: Any, read: Any) -> Any:
        seen.extend(pairs)
        assert all(read(row).startswith(b"\xff\xd8") for pair in seen for row in pair[:2])
        return seen[:3]

    monkeypatch.setattr("stages.suspects.confirmed", all_confirmed)
    _, numbers = run(pipeline, tmp_path)
    found = read_csv(tmp_path / "near_duplicates.csv", PAIRS.split(","))
    assert ",".join(found) == PAIRS
    assert len(found) == 3
    assert ((found["label"] != found["other_label"]) | (found["split"] != found["other_split"])).all()
    counts = numbers["near_duplicates"]
    assert counts["other_label"] == (found["label"] != found["other_label"]).sum()
    assert counts["other_split"] == (found["split"] != found["other_split"]).sum()


def test_nothing_to_find(pipeline: Pipeline, tmp_path: Path) -> None:
    labels = table_of(pipeline)
    write_csv(labels[labels["label"] == "red"], tmp_path / "labels.csv")
    found, numbers = run(pipeline, tmp_path, tmp_path / "labels.csv")
    assert ",".join(found) == COLUMNS
    assert found.empty
    assert numbers["likely"] == 0
    write_csv(labels.assign(sha256="0" * 64), tmp_path / "labels.csv")
    with pytest.raises(BreedlineError, match="names no image of"):
        run(pipeline, tmp_path, tmp_path / "labels.csv")


def test_it_needs_no_trained_model(pipeline: Pipeline, tmp_path: Path) -> None:
    for name in ("presized", "labels.csv", "weights"):
        source = pipeline.path(name)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    moved = type(pipeline)(tmp_path, pipeline.params)
    assert len(run(moved, tmp_path / "out")[0]) == 180
