import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock
from joblib.parallel import ThreadingBackend
from PIL import Image

import breedline.presized
from breedline.files import cache_dir, sha256_of
from breedline.images import ENCODED, KEPT, RESIZED, Presized, presize_image
from breedline.params import Presize
from breedline.presized import UNUSED_DAYS, PresizedVolume, Presizer
from breedline.shards import COLUMNS, pack

ROOT = Path(__file__).parents[2]
PARAMS = Presize(shorter_side=24, quality=90)
Volume = tuple[Path, pd.DataFrame]
Make = Callable[..., PresizedVolume]


def photo(number: int, size: tuple[int, int] = (24, 30), kind: str = "JPEG") -> bytes:
    """A picture that differs for each number."""
    noise = np.random.default_rng(number).integers(0, 255, (size[1] // 6, size[0] // 6, 3), dtype="uint8")
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size).save(buffer, kind)
    return buffer.getvalue()


FILES = {f"{number}.jpg": photo(number) for number in range(5)} | {
    "large.jpg": photo(5, (90, 60)),
    "small.png": photo(6, kind="PNG"),
    "again.png": photo(6, kind="PNG"),
    "broken.jpg": photo(7)[:-30],
}
NEW = {"new.jpg": photo(8), "newer.jpg": photo(9)}


@pytest.fixture
def raw(tmp_path: Path) -> Callable[..., Volume]:
    """A function that packs {name: content} into one raw volume."""

    def make(files: dict[str, bytes], name: str = "00") -> Volume:
        folder = tmp_path / "raw"
        folder.mkdir(exist_ok=True)
        entries = list(pack(((n, len(c), io.BytesIO(c)) for n, c in files.items()), folder, name))
        return folder / entries[0].shard, pd.DataFrame(entries, columns=COLUMNS)

    return make


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that were decoded, rather than taken from the cache."""
    seen: list[bytes] = []

    def note(data: bytes, size: int, quality: int) -> Presized:
        seen.append(data)
        return presize_image(data, size, quality)

    monkeypatch.setattr(breedline.presized, "presize_image", note)
    return seen


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A function that presizes one raw volume as a run of its own, into `out.tar`."""

    def presized(volume: Volume, params: Presize = PARAMS, workers: int = 2) -> PresizedVolume:
        (tmp_path / "out.tar").unlink(missing_ok=True)
        return Presizer(params, workers).volume(*volume, tmp_path / "out.tar", lambda count: None)

    return presized


def test_the_table_tells_what_became_of_every_image(tmp_path: Path, raw: Callable[..., Volume], make: Make) -> None:
    path, rows = raw(FILES)
    table = make((path, rows)).table
    assert list(table["name"]) == list(FILES)
    assert list(table["origin"]) == list(rows["sha256"])
    assert list(table["made"]) == 5 * [KEPT] + [RESIZED, ENCODED, ENCODED, ""]
    assert list(table["rejected"] != "") == 8 * [False] + [True]
    content = (tmp_path / "out.tar").read_bytes()
    for row in table[table["rejected"] == ""].to_dict("records"):
        data = content[row["offset"] : row["offset"] + row["size"]]
        assert presize_image(FILES[row["name"]], 24, 90) == (data, row["height"], row["width"], row["made"])
    assert set(table["shard"]) == {"out.tar"}


def test_a_file_larger_than_any_image_is_rejected_unread(
    raw: Callable[..., Volume], make: Make, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breedline.presized, "MAX_BYTES", 1000)
    table = make(raw({"0.jpg": photo(0), "large.jpg": photo(0) + bytes(1000)})).table
    assert table["rejected"].tolist() == ["", "over 1000 bytes"]
    assert decoded == [photo(0)]


def test_a_volume_of_the_same_images_is_linked_from_the_cache(
    tmp_path: Path, raw: Callable[..., Volume], make: Make, decoded: list[bytes]
) -> None:
    first = make(raw(FILES))
    assert sorted(decoded) == sorted(FILES.values())
    stamp = (tmp_path / "out.tar").stat()
    second = make(raw(FILES))
    assert len(decoded) == len(FILES)
    assert (first.cached, second.cached) == (0, len(FILES))
    pd.testing.assert_frame_equal(first.table, second.table)
    # the same file, untouched: whoever has it linked, DVC for one, would have to read it again
    after = (tmp_path / "out.tar").stat()
    assert (after.st_ino, after.st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)


@pytest.mark.parametrize(
    "files", [FILES | NEW, NEW | FILES, {f"other/{name}": content for name, content in FILES.items()} | NEW]
)
def test_in_another_volume_only_new_images_are_decoded(
    tmp_path: Path,
    raw: Callable[..., Volume],
    make: Make,
    decoded: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
) -> None:
    make(raw(FILES))
    decoded.clear()
    again = make(raw(files))
    assert sorted(decoded) == sorted(NEW.values())
    assert again.cached == len(FILES)
    with_cache = sha256_of(tmp_path / "out.tar")
    monkeypatch.setenv("BREEDLINE_CACHE", str(tmp_path / "empty"))
    pd.testing.assert_frame_equal(make(raw(files)).table, again.table)
    assert sha256_of(tmp_path / "out.tar") == with_cache


def test_renamed_images_are_known_and_get_their_new_names(
    raw: Callable[..., Volume], make: Make, decoded: list[bytes]
) -> None:
    make(raw(FILES))
    decoded.clear()
    renamed = {f"other/{name}": content for name, content in FILES.items()}
    assert list(make(raw(renamed)).table["name"]) == list(renamed)
    assert decoded == []


@pytest.mark.parametrize("other", [Presize(shorter_side=25, quality=90), Presize(shorter_side=24, quality=91)])
def test_other_settings_have_a_cache_of_their_own(
    raw: Callable[..., Volume], make: Make, decoded: list[bytes], other: Presize
) -> None:
    make(raw(FILES))
    decoded.clear()
    assert make(raw(FILES), other).cached == 0
    assert len(decoded) == len(FILES)
    assert make(raw(FILES)).cached == make(raw(FILES), other).cached == len(FILES)


@pytest.mark.parametrize("name", ["VERSION", "DECODER"])
def test_another_decoder_has_a_cache_of_its_own(
    raw: Callable[..., Volume], make: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make(raw(FILES))
    monkeypatch.setattr(breedline.presized, name, "next")
    assert make(raw(FILES)).cached == 0


def cut(path: Path) -> None:
    os.truncate(path, 2000)


def flip(path: Path) -> None:
    """Change the middle of the first file."""
    time.sleep(0.05)  # file systems count time in ticks
    with path.open("r+b") as file:
        file.seek(700)
        byte = file.read(1)[0]
        file.seek(700)
        file.write(bytes([byte ^ 255]))


def rot(path: Path) -> None:
    """As `flip`, but unseen: no time of change."""
    stamp = path.stat()
    flip(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def empty(path: Path) -> None:
    os.truncate(path, 0)


def babble(path: Path) -> None:
    path.write_bytes(b"\xff\xfe no table at all")


def tamper(column: str, value: object) -> Callable[[Path], None]:
    """A function that changes what a table says of its third image."""

    def change(path: Path) -> None:
        table = pd.read_csv(path, keep_default_na=False)
        table[column] = table[column].astype(object)
        table.loc[2, column] = value
        table.to_csv(path, index=False)

    return change


DAMAGE = [
    (cut, "*.tar"),
    (flip, "*.tar"),
    (empty, "*.tar"),
    (Path.unlink, "*.tar"),
    (Path.unlink, "*.csv"),
    (empty, "*.csv"),
    (babble, "*.csv"),
    (tamper("offset", -5), "*.csv"),
    (tamper("offset", 2**63 - 1), "*.csv"),
    (tamper("size", -5), "*.csv"),
    (tamper("size", 2**62), "*.csv"),
    (tamper("size", 2**70), "*.csv"),
    (tamper("height", -1), "*.csv"),
]


@pytest.mark.parametrize(
    ("damage", "what"),
    [*DAMAGE, (tamper("name", "../x"), "*.csv"), (tamper("shard", "../x"), "*.csv"), (tamper("origin", "0"), "*.csv")],
)
def test_a_damaged_cache_never_reaches_the_output(
    tmp_path: Path, raw: Callable[..., Volume], make: Make, damage: Callable[[Path], None], what: str
) -> None:
    good = make(raw(FILES)).table
    content = (tmp_path / "out.tar").read_bytes()
    (cached,) = (tmp_path / "cache" / "presize").glob(f"*/{what}")
    damage(cached)
    pd.testing.assert_frame_equal(make(raw(FILES)).table, good)
    assert (tmp_path / "out.tar").read_bytes() == content
    assert make(raw(FILES)).cached == len(FILES), "the cache is mended"


@pytest.mark.parametrize(("damage", "what"), [*DAMAGE, (rot, "*.tar")])
def test_a_damaged_cache_never_reaches_another_volume(
    tmp_path: Path, raw: Callable[..., Volume], make: Make, damage: Callable[[Path], None], what: str
) -> None:
    make(raw(FILES | NEW))
    content = (tmp_path / "out.tar").read_bytes()
    for file in (tmp_path / "cache" / "presize").glob("*/*"):
        file.unlink()
    make(raw(FILES))
    (cached,) = (tmp_path / "cache" / "presize").glob(f"*/{what}")
    damage(cached)
    assert 0 <= make(raw(FILES | NEW)).cached < len(FILES)
    assert (tmp_path / "out.tar").read_bytes() == content


def test_on_another_file_system_the_cache_holds_copies(
    tmp_path: Path, raw: Callable[..., Volume], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_file_system(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_file_system)
    make(raw(FILES))
    content = (tmp_path / "out.tar").read_bytes()
    assert make(raw(FILES)).cached == len(FILES)
    flip(tmp_path / "out.tar")
    assert make(raw(FILES)).cached == len(FILES)
    assert (tmp_path / "out.tar").read_bytes() == content


def test_entries_that_no_run_has_used_for_long_are_removed(
    tmp_path: Path, raw: Callable[..., Volume], make: Make
) -> None:
    old = time.time() - (UNUSED_DAYS + 1) * 86400
    make(raw(FILES))
    make(raw(NEW))
    litter = tmp_path / "cache" / "presize" / "another setting" / ".x.tar.7.partial"
    litter.parent.mkdir()
    litter.touch()
    for file in (tmp_path / "cache" / "presize").glob("*/*"):
        os.utime(file, (old, old))
    assert make(raw(FILES)).cached == len(FILES)  # and so it is in use
    Presizer(PARAMS, 1).prune()
    left = sorted(file.suffix for file in (tmp_path / "cache" / "presize").glob("*/*"))
    assert left == [".csv", ".tar"]
    assert make(raw(FILES)).cached == len(FILES)
    assert make(raw(NEW)).cached == 0


KILLED = """
import os, signal, sys
import pandas as pd
from pathlib import Path
import breedline.presized
from breedline.params import Presize

def half(source, target):
    target.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

breedline.presized.link_or_copy = half
presizer = breedline.presized.Presizer(Presize(shorter_side=24, quality=90), 1)
presizer.volume(Path(sys.argv[1]), pd.read_csv(sys.argv[2]), Path("out.tar"), print)
"""


def test_what_a_killed_run_left_in_the_cache_goes_with_the_next_one_whatever_that_makes(
    tmp_path: Path, raw: Callable[..., Volume], make: Make
) -> None:
    path, rows = raw(FILES)
    rows.to_csv("rows.csv", index=False)
    command = [sys.executable, "-c", KILLED, str(path), "rows.csv"]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    cached = list((tmp_path / "cache" / "presize").glob("*/*"))
    assert [file.read_bytes() for file in cached] == [b"half"]
    (cached[0].parent / "volume_without_table.tar").touch()
    make(raw(NEW))
    Presizer(PARAMS, 1).prune()
    left = list((tmp_path / "cache" / "presize").glob("*/*"))
    assert sorted(file.suffix for file in left) == [".csv", ".tar"]
    assert make(raw(NEW)).cached == len(NEW)


def test_two_runs_do_not_write_to_the_cache_at_the_same_time(
    tmp_path: Path, raw: Callable[..., Volume], make: Make
) -> None:
    volume = raw(FILES)
    with ThreadPoolExecutor() as threads:
        with FileLock(cache_dir("locks") / "presize.lock"):
            future = threads.submit(make, volume)
            with pytest.raises(TimeoutError):
                future.result(timeout=1)
            assert not list((tmp_path / "cache" / "presize").glob("*/*"))
        assert future.result(timeout=60).cached == 0
    assert make(volume).cached == len(FILES)


def test_pruning_tolerates_that_another_run_removes_a_file_first(
    tmp_path: Path, raw: Callable[..., Volume], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(raw(FILES))
    gone = tmp_path / "cache" / "presize" / "setting" / ".x.tar.7.partial"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([gone]))
    Presizer(PARAMS, 1).prune()


def test_a_cache_that_is_deleted_meanwhile_is_made_anew(tmp_path: Path, raw: Callable[..., Volume]) -> None:
    presizer = Presizer(PARAMS, 1)
    presizer.volume(*raw(NEW, "00"), tmp_path / "one.tar", lambda count: None)
    again = Presizer(PARAMS, 1)
    again.volume(*raw(FILES, "01"), tmp_path / "two.tar", lambda count: None)  # it knows what is cached
    shutil.rmtree(tmp_path / "cache")
    table = again.volume(*raw(FILES | NEW, "02"), tmp_path / "all.tar", lambda count: None).table
    assert len(table) == len(FILES | NEW)


def test_what_stops_the_writing_stops_the_workers(
    raw: Callable[..., Volume], make: Make, decoded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, *_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(breedline.presized.Volume, "add", full)
    with pytest.raises(OSError, match="No space left"):
        make(raw({f"{number}.jpg": photo(number) for number in range(300)}))
    seen = len(decoded)
    time.sleep(0.1)
    assert len(decoded) == seen < 300


class Counting(ThreadingBackend):
    """A joblib backend other than joblib's own, as Dask's or Ray's, that counts the batches it gets."""

    batches = 0

    def submit(self, func: Any, callback: Any = None) -> Any:
        Counting.batches += 1
        return super().submit(func, callback)


@pytest.mark.parametrize("backend", ["counting", pytest.param("loky", marks=pytest.mark.slow)])
def test_another_joblib_backend_can_replace_the_threads(
    tmp_path: Path,
    raw: Callable[..., Volume],
    make: Make,
    decoded: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    in_threads = make(raw(FILES)).table
    content = (tmp_path / "out.tar").read_bytes()
    assert len(decoded) == len(FILES)
    monkeypatch.setenv("BREEDLINE_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(Counting, "batches", 0)
    joblib.register_parallel_backend("counting", Counting)
    presizer = Presizer(PARAMS, 2)
    with joblib.parallel_config(backend=backend):
        elsewhere = presizer.volume(*raw(FILES), tmp_path / "other.tar", lambda count: None).table
    if backend == "counting":
        assert Counting.batches > 1
    else:
        assert len(decoded) == len(FILES), "nothing more was decoded in this process"
    pd.testing.assert_frame_equal(elsewhere.assign(shard="out.tar"), in_threads)
    assert (tmp_path / "other.tar").read_bytes() == content
