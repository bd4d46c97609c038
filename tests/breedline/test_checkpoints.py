from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch
from filelock import FileLock

from breedline.checkpoints import Checkpoints, _save, remove_those_of
from breedline.files import cache_dir, sha256_of


def save_epochs(last: int) -> Checkpoints:
    checkpoints = Checkpoints({"seed": 1})
    for epoch in range(1, last + 1):
        checkpoints.keep_epoch(epoch, {"epoch": epoch, "weights": torch.arange(64.0)})
    return checkpoints


def flip(path: Path, position: int, bits: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


def test_the_last_two_epochs_are_kept_and_the_last_one_is_read() -> None:
    assert Checkpoints({"seed": 1}).latest_epoch() is None
    names = {path.name for path in save_epochs(4).folder.iterdir()}
    assert names == {"epoch-000003.pt", "epoch-000003.pt.sha256", "epoch-000004.pt", "epoch-000004.pt.sha256"}
    latest = Checkpoints({"seed": 1}).latest_epoch()
    assert latest
    assert latest["epoch"] == 4


def test_two_runs_do_not_write_checkpoints_at_the_same_time() -> None:
    checkpoints = Checkpoints({"seed": 1})
    with ThreadPoolExecutor() as threads:
        with FileLock(cache_dir("locks") / f"{checkpoints.folder.name}-checkpoints.lock"):
            saved = threads.submit(checkpoints.keep_epoch, 1, {"epoch": 1})
            with pytest.raises(TimeoutError):
                saved.result(timeout=0.5)
            assert checkpoints.latest_epoch() is None
        saved.result(timeout=60)
    assert checkpoints.latest_epoch() == {"epoch": 1}


def test_other_inputs_have_checkpoints_of_their_own() -> None:
    Checkpoints({"seed": 1, "lr": 0.1}).keep_epoch(1, {})
    assert Checkpoints({"seed": 2, "lr": 0.1}).latest_epoch() is None
    assert Checkpoints({"lr": 0.1, "seed": 1}).latest_epoch() == {}


@pytest.mark.parametrize("name", ["epoch-000002.pt", "epoch-000002.pt.sha256"])
def test_any_flipped_byte_is_noticed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_epochs(2).folder
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    size = len(whole[folder / name])
    positions = range(size) if size < 300 else [*range(0, size, 7), size - 1]
    for position in positions:
        for path, data in whole.items():
            path.write_bytes(data)
        flip(folder / name, position, 1 << position % 8)
        caplog.clear()
        latest = Checkpoints({"seed": 1}).latest_epoch()
        assert latest, position
        assert latest["epoch"] == 1, position
        assert caplog.messages == [
            "train: checkpoint epoch-000002.pt is damaged (its sha256 differs): going on without it"
        ]


@pytest.mark.parametrize(
    "damage",
    [
        *(pytest.param(lambda path, n=n: path.write_bytes(path.read_bytes()[:n]), id=f"cut {n}") for n in (0, 20, -1)),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"\0"), id="longer"),
        pytest.param(lambda path: path.with_name(path.name + ".sha256").unlink(), id="no sha256"),
    ],
)
def test_a_damaged_one_gives_way_to_the_one_before(damage: Callable[[Path], object]) -> None:
    checkpoints = save_epochs(3)
    damage(checkpoints.folder / "epoch-000003.pt")
    latest = checkpoints.latest_epoch()
    assert latest
    assert latest["epoch"] == 2
    checkpoints.keep_epoch(3, {"epoch": 3})
    assert checkpoints.latest_epoch() == {"epoch": 3}


def test_where_all_are_damaged_the_training_starts_anew() -> None:
    checkpoints = save_epochs(2)
    for path in checkpoints.folder.glob("*.pt"):
        flip(path, 100, 1)
    assert checkpoints.latest_epoch() is None


def test_code_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "done",)

    checkpoints = save_epochs(1)
    path = checkpoints.folder / "epoch-000001.pt"
    torch.save({"model": Evil()}, path)
    path.with_name("epoch-000001.pt.sha256").write_text(sha256_of(path))
    with pytest.raises(UnpicklingError):
        checkpoints.latest_epoch()
    assert not (tmp_path / "done").exists()


def test_what_is_kept_lives_as_long_as_the_checkpoints() -> None:
    checkpoints = Checkpoints({})
    assert checkpoints.kept("head") is None
    value = {"state": {"weight": torch.arange(4.0)}, "penalty": 0.1 + 0.2}
    checkpoints.keep("head", value)
    kept = Checkpoints({}).kept("head")
    assert torch.equal(kept["state"]["weight"], torch.arange(4.0))
    assert kept["penalty"] == 0.1 + 0.2
    for epoch in range(1, 5):
        checkpoints.keep_epoch(epoch, {})
    assert checkpoints.kept("head"), "removed with the epochs"
    assert checkpoints.latest_epoch() == {}
    checkpoints.clear()
    assert not checkpoints.folder.exists()
    assert Checkpoints({}).kept("head") is None


def test_the_checkpoints_that_a_file_was_made_of_are_removed_by_its_reader(tmp_path: Path) -> None:
    (mine, other), unfinished = (tmp_path / "a", tmp_path / "b"), Checkpoints({"a training": "unfinished"})
    for output in (mine, other):
        output.write_text(output.name)
        Checkpoints({"a training": output.name}).made(output)
    remove_those_of(mine)
    left = {folder.name for folder in cache_dir("checkpoints").iterdir()}
    assert left == {Checkpoints({"a training": "b"}).folder.name, unfinished.folder.name}


def test_another_run_may_remove_checkpoints_while_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "output").touch()

    def write() -> None:
        for epoch in range(40):
            Checkpoints({}).keep_epoch(epoch, {})
            Checkpoints({}).made(tmp_path / "output")

    def remove() -> None:
        for _ in range(40):
            remove_those_of(tmp_path / "output")
            Checkpoints({}).clear()

    with ThreadPoolExecutor() as executor:
        for done in [executor.submit(does) for does in (write, write, remove)]:
            done.result()


def test_what_is_kept_and_damaged_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints({})
    checkpoints.keep("part", 16)
    flip(checkpoints.folder / "part.pt", 100, 1)
    assert checkpoints.kept("part") is None
    assert caplog.messages == ["train: checkpoint part.pt is damaged (its sha256 differs): going on without it"]


def test_only_a_few_trainings_are_kept() -> None:
    for seed in range(9):
        Checkpoints({"seed": seed}).keep_epoch(1, {"seed": seed})
    kept = [seed for seed in range(9) if (Checkpoints({"seed": seed}).folder / "epoch-000001.pt").exists()]
    assert len(kept) <= 4


def test_a_full_disk_is_told_as_such() -> None:
    """Not as an error of torch's own."""
    with pytest.raises(OSError, match="No space left on device"):
        _save({"weights": torch.zeros(9)}, Path("/dev/full"))
