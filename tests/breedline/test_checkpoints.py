from pathlib import Path
from pickle import UnpicklingError

import pytest
import torch

from breedline.checkpoints import Checkpoints


def test_the_last_two_epochs_are_kept_and_the_last_one_is_read() -> None:
    checkpoints = Checkpoints({"seed": 1})
    assert checkpoints.latest() is None
    for epoch in range(1, 5):
        checkpoints.save(epoch, {"epoch": epoch, "weights": torch.ones(2)})
    assert [path.name for path in sorted(checkpoints.folder.iterdir())] == ["000003.pt", "000004.pt"]
    latest = Checkpoints({"seed": 1}).latest()
    assert latest
    assert latest["epoch"] == 4


def test_other_inputs_know_nothing_of_it() -> None:
    Checkpoints({"seed": 1, "lr": 0.1}).save(1, {})
    assert Checkpoints({"seed": 2, "lr": 0.1}).latest() is None
    assert Checkpoints({"lr": 0.1, "seed": 1}).latest() == {}


@pytest.mark.parametrize("keep", [0, 20, 1000, -1000, -1])
def test_one_that_is_cut_short_gives_way_to_the_one_before(keep: int) -> None:
    checkpoints = Checkpoints({})
    for epoch in (1, 2):
        checkpoints.save(epoch, {"epoch": epoch})
    last = checkpoints.folder / "000002.pt"
    last.write_bytes(last.read_bytes()[:keep])
    assert checkpoints.latest() == {"epoch": 1}


def test_code_is_not_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "done",)

    checkpoints = Checkpoints({})
    torch.save({"model": Evil()}, checkpoints.folder / "000001.pt")
    with pytest.raises(UnpicklingError):
        checkpoints.latest()
    assert not (tmp_path / "done").exists()


def test_notes_live_as_long_as_the_checkpoints() -> None:
    checkpoints = Checkpoints({})
    assert checkpoints.noted("lr_find") is None
    checkpoints.note("lr_find", {"rules": {"valley": 0.1 + 0.2}})
    assert Checkpoints({}).noted("lr_find") == {"rules": {"valley": 0.1 + 0.2}}
    checkpoints.clear()
    assert not checkpoints.folder.exists()
    assert Checkpoints({}).noted("lr_find") is None


def test_the_trainings_that_are_kept_are_few() -> None:
    for seed in range(9):
        Checkpoints({"seed": seed}).save(1, {"seed": seed})
    kept = [seed for seed in range(9) if (Checkpoints({"seed": seed}).folder / "000001.pt").exists()]
    assert len(kept) <= 4
