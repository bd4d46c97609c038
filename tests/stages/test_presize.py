import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import breedline.presized
from breedline.errors import BreedlineError
from breedline.files import sha256_of
from breedline.images import ENCODED, KEPT, RESIZED, Presized, presize_image
from breedline.params import Params, Presize
from breedline.shards import COLUMNS, PRESIZED_COLUMNS, ShardSet, pack, write_index
from breedline.tables import read_csv, write_csv
from stages.presize import presize

ROOT = Path(__file__).parents[2]
PARAMS = Presize(shorter_side=24, quality=90)
Source = dict[str, bytes]
Process = subprocess.Popen[str]


def photo(number: int, size: tuple[int, int] = (24, 30), kind: str = "JPEG") -> bytes:
    """A picture that differs for each number."""
    noise = np.random.default_rng(number).integers(0, 255, (size[1] // 6, size[0] // 6, 3), dtype="uint8")
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size).save(buffer, kind)
    return buffer.getvalue()


FIRST = {f"{number}.jpg": photo(number) for number in range(12)} | {
    "large.jpg": photo(20, (90, 60)),
    "really a.gif.jpg": photo(21, kind="GIF"),
    "cut.jpg": photo(22)[:-30],
    "page.jpg": b"\xff\xd8\xff<html>",
}
SECOND = {"more.jpg": photo(23), "0.jpg": photo(0)}
VOLUME_BYTES = 6000


def write_raw(*sources: Source) -> None:
    """Make `raw` and `labels.csv` of some sources, in small volumes."""
    shutil.rmtree("raw", ignore_errors=True)
    Path("raw").mkdir()
    entries = []
    for number, source in enumerate(sources):
        files = ((name, len(content), io.BytesIO(content)) for name, content in source.items())
        entries += pack(files, Path("raw"), f"{number:02d}", VOLUME_BYTES)
    table = pd.DataFrame(entries, columns=COLUMNS)
    write_index(table, Path("raw"))
    write_csv(table[["name", "sha256"]].assign(label="pug", split="train"), Path("labels.csv"))


def run(workers: int = 2, params: Presize = PARAMS) -> dict[str, str]:
    """Run the stage; the hash of every file that it wrote."""
    presize(params, Path("raw"), Path("labels.csv"), presized=Path("presized"), workers=workers)
    return hashes()


def hashes() -> dict[str, str]:
    return {path.name: sha256_of(path) for path in Path("presized").iterdir()}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that were decoded, rather than taken from the cache."""
    seen: list[bytes] = []

    def note(data: bytes, size: int, quality: int) -> Presized:
        seen.append(data)
        return presize_image(data, size, quality)

    monkeypatch.setattr(breedline.presized, "presize_image", note)
    return seen


def test_every_labelled_image_becomes_a_jpeg_or_a_reject_with_its_reason() -> None:
    write_raw(FIRST, SECOND)
    run()
    images = ShardSet(Path("presized"), PRESIZED_COLUMNS)
    rows = images.index.to_dict("records")
    assert [row["name"] for row in rows] == [name for name in (*FIRST, *SECOND) if name not in ("cut.jpg", "page.jpg")]
    for row in rows:
        content = {**FIRST, **SECOND}[row["name"]]
        data = images.read(row["shard"], row["offset"], row["size"])
        assert presize_image(content, 24, 90) == (data, row["height"], row["width"], row["made"])
    assert {row["name"]: row["made"] for row in rows if row["made"] != KEPT} == {
        "large.jpg": RESIZED,
        "really a.gif.jpg": ENCODED,
    }
    raw = ShardSet(Path("raw")).index
    assert set(images.index["origin"]) < set(raw["sha256"])
    rejected = read_csv(Path("presized/rejected.csv"), ["name", "sha256", "reason"]).to_dict("records")
    assert [(row["name"], row["reason"].split(" (")[0]) for row in rejected] == [
        ("cut.jpg", "image file is truncated"),
        ("page.jpg", "not a whole JPEG, PNG, GIF, BMP, WEBP or TIFF"),
    ]
    assert {row["sha256"] for row in rejected} == set(raw.loc[raw["name"].isin(["cut.jpg", "page.jpg"]), "sha256"])


def test_each_raw_volume_gives_one_presized_volume() -> None:
    write_raw(FIRST, SECOND)
    volumes = {path.name for path in Path("raw").glob("*.tar")}
    assert len(volumes) > 3
    assert run().keys() == volumes | {"index.csv", "rejected.csv"}


def test_what_is_not_labelled_is_left_out(decoded: list[bytes]) -> None:
    write_raw(FIRST)
    labels = read_csv(Path("labels.csv"), ["name"])
    write_csv(labels[labels["name"].isin(["3.jpg", "large.jpg"])], Path("labels.csv"))
    run()
    assert list(ShardSet(Path("presized")).index["name"]) == ["3.jpg", "large.jpg"]
    assert len(decoded) == 2


def test_the_bytes_do_not_depend_on_the_workers_the_run_or_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_raw(FIRST, SECOND)
    results = []
    for workers in (1, 2, 4, -1):
        monkeypatch.setenv("BREEDLINE_CACHE", str(tmp_path / f"cache {workers}"))
        results += [run(workers), run(workers)]
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("sources", [(FIRST, SECOND), (SECOND, FIRST), ({**SECOND, **FIRST},)])
def test_a_grown_data_set_costs_only_its_new_images(
    tmp_path: Path,
    decoded: list[bytes],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    sources: tuple[Source, ...],
) -> None:
    write_raw(FIRST)
    run()
    decoded.clear()
    write_raw(*sources)
    with caplog.at_level("INFO", "breedline"):
        grown = run()
    assert decoded == [SECOND["more.jpg"]]
    count = sum(map(len, sources))
    assert caplog.messages == [
        f"presize: {count} images: {count - 4} kept, 1 resized, 1 encoded, 2 rejected; {count - 1} of them from the cache"
    ]
    monkeypatch.setenv("BREEDLINE_CACHE", str(tmp_path / "empty"))
    assert run() == grown


@pytest.mark.parametrize("absolute", [False, True])
def test_a_tampered_index_overwrites_nothing_outside(absolute: bool) -> None:
    write_raw(SECOND)
    canary = Path("canary.tar").absolute()
    shutil.copy("raw/00-00000.tar", canary)  # so that the volume it names can be read
    before = sha256_of(canary)
    index = read_csv(Path("raw/index.csv"), COLUMNS)
    write_index(index.assign(shard=str(canary) if absolute else "../canary.tar"), Path("raw"))
    with pytest.raises(BreedlineError, match="is no volume of a shard set"):
        run()
    assert sha256_of(canary) == before
    assert not Path("presized").exists()


@pytest.mark.parametrize("name", ["*.tar", "*.csv"])
def test_a_lost_cache_entry_changes_nothing(tmp_path: Path, name: str) -> None:
    write_raw(FIRST)
    first = run()
    lost = sorted((tmp_path / "cache" / "presize").glob(f"*/{name}"))[0]
    lost.unlink()
    assert run() == first
    assert lost.is_file()


def test_if_nothing_can_be_decoded_that_is_an_error_and_the_earlier_result_stays() -> None:
    write_raw(SECOND)
    first = run()
    write_raw({"cut.jpg": FIRST["cut.jpg"], "page.jpg": FIRST["page.jpg"]})
    with pytest.raises(
        BreedlineError, match=r"^no image could be decoded; the first: cut.jpg: image file is truncated"
    ):
        run()
    assert hashes() == first
    assert not list(Path().glob(".presized*"))


WARNING = (
    "presize: half of the images have a shorter side of 300 pixels or more, reduced to presize.shorter_side = 24: "
    "raise it for photos, as in presets/photos.yaml"
)


@pytest.mark.parametrize(
    ("sizes", "shorter_side", "lines"),
    [
        ([(400, 300)] * 3, 24, [WARNING]),
        ([(300, 400), (30, 24), (24, 30), (900, 600)], 24, []),
        ([(300, 400), (30, 24), (400, 300), (900, 600)], 24, [WARNING]),
        ([(400, 300)] * 3, 75, []),  # a quarter of the shorter side is not tiny
        ([(1200, 900)] * 3, 224, []),  # nor is what pretrained models take
    ],
)
def test_a_tiny_shorter_side_for_large_images_is_warned_of_from_the_cache_too(
    caplog: pytest.LogCaptureFixture, sizes: list[tuple[int, int]], shorter_side: int, lines: list[str]
) -> None:
    write_raw({f"{number}.jpg": photo(number, size) for number, size in enumerate(sizes)} | {"page.jpg": b"<html>"})
    for _ in range(2):
        caplog.clear()
        run(params=Presize(shorter_side=shorter_side, quality=90))
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == lines


def test_labels_that_name_no_raw_image_are_an_error() -> None:
    write_raw(FIRST)
    shutil.copy("labels.csv", "other.csv")
    write_raw({"more.jpg": photo(23)})
    shutil.move("other.csv", "labels.csv")
    with pytest.raises(BreedlineError, match=r"^labels.csv names no image of raw: `dvc repro` makes both to fit$"):
        run()


def test_a_run_removes_old_cache_entries(tmp_path: Path) -> None:
    old = tmp_path / "cache" / "presize" / "other" / "old.csv"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (0, 0))
    write_raw(SECOND)
    run()
    assert not old.exists()


@pytest.fixture
def start() -> Iterator[Callable[[], Process]]:
    """A function that starts the stage as DVC does, on work of a few seconds in many volumes."""
    write_raw({f"{number}.jpg": photo(number, (2700, 1800)) for number in range(40)})
    shutil.copy(ROOT / "params.yaml", "params.yaml")
    paths = {"raw": "raw", "labels": "labels.csv", "presized": "presized", "workers": "1"}
    command = [sys.executable, "-m", "stages.presize", *(f"--{name}={value}" for name, value in paths.items())]
    with ExitStack() as processes:

        def go() -> Process:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield go


def wait_for_a_finished_volume(cache: Path, process: Process) -> None:
    deadline = time.monotonic() + 60
    while not list(cache.glob("presize/*/*.csv")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_after_a_kill_the_next_run_goes_on_from_the_last_finished_volume(
    tmp_path: Path, start: Callable[[], Process], monkeypatch: pytest.MonkeyPatch, defaults: Params
) -> None:
    first = start()
    wait_for_a_finished_volume(tmp_path / "cache", first)
    first.kill()
    first.wait()
    assert not Path("presized").exists()
    finished = len(list((tmp_path / "cache").glob("presize/*/*.csv")))
    assert 0 < finished < 40

    second = start()
    lines = second.communicate()[1].splitlines()
    assert second.returncode == 0
    assert lines[1:] == [f"presize: 40 images: 40 resized, 0 rejected; {finished} of them from the cache"]
    assert not list(Path().glob(".presized*"))
    resumed = hashes()
    monkeypatch.setenv("BREEDLINE_CACHE", str(tmp_path / "empty"))
    assert run(params=defaults.presize) == resumed


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_leaves_the_earlier_result(tmp_path: Path, start: Callable[[], Process]) -> None:
    Path("presized").mkdir()
    Path("presized/index.csv").write_text("of an earlier run")
    process = start()
    wait_for_a_finished_volume(tmp_path / "cache", process)
    process.send_signal(signal.SIGINT)
    lines = process.communicate()[1].splitlines()
    assert process.returncode == 130
    assert len(lines) == 2
    assert lines[1].startswith("error: presize: interrupted")
    assert [path.read_text() for path in Path("presized").iterdir()] == ["of an earlier run"]
    assert not list(Path().glob(".presized*"))
