"""Checkpoints, from which a killed training resumes bit for bit (on a GPU: nearly so).

Checkpoints lie outside DVC's outputs, which are removed before a stage runs, in a folder named by a hash of all that
the training depends on: equal inputs resume, anything else starts from scratch. Beside each file lies its SHA-256, for
torch.load does not notice flipped bits; a file that differs from its SHA-256 is left out. Files hold tensors and plain
values, which are read without executing code.

They stay when a stage has ended, since DVC records its outputs only then: whoever kills it in between loses nothing. The
stage that reads what was made of them removes them, for it runs when that is recorded.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, FileLock

from breedline.files import cache_dir, new_file, sha256_of
from breedline.ranks import rank

log = logging.getLogger("breedline")

EPOCHS_KEPT = 2
"""Checkpoints kept per training: the last, and the one before it in case the last is damaged."""
TRAININGS_KEPT = 4
"""Trainings whose checkpoints are kept, the running one included."""
MADE = "made"
"""A file with the SHA-256 of what was made of the checkpoints beside it."""


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        """`inputs` is everything that the training depends on, as values that JSON can hold."""
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
        trainings = cache_dir("checkpoints")
        self.folder = trainings / key
        with _alone(self.folder):
            self.folder.mkdir(exist_ok=True)
            self.folder.touch()
        for old in sorted(trainings.iterdir(), key=_last_used)[:-TRAININGS_KEPT]:
            _remove(old)

    def latest_epoch(self) -> dict[str, Any] | None:
        """The state in the newest undamaged checkpoint of an epoch, or None if there is none."""
        states = (self._read(path) for path in reversed(self._epochs()))
        return next((state for state in states if state is not None), None)

    def keep_epoch(self, epoch: int, state: dict[str, Any]) -> None:
        """Keep the state after `epoch` epochs, counted over both phases, and of the earlier ones the newest."""
        self.keep(f"epoch-{epoch:06d}", state)
        for old in self._epochs()[:-EPOCHS_KEPT]:
            old.unlink(missing_ok=True)
            _sha256_file(old).unlink(missing_ok=True)

    def kept(self, name: str) -> Any:
        """The value that `keep` stored, or None if there is none or its file is damaged."""
        path = self.folder / f"{name}.pt"
        return self._read(path) if path.is_file() else None

    def keep(self, name: str, value: Any) -> None:
        """Store tensors and plain values, to be removed with the other checkpoints; of several processes, rank 0 does."""
        if rank() > 0:
            return
        path = self.folder / f"{name}.pt"
        with _alone(self.folder), new_file(path) as temporary:
            _save(value, temporary)
            # written before the file gets its name, so that a kill in between leaves no file without a SHA-256
            with new_file(_sha256_file(path)) as recorded:
                recorded.write_text(sha256_of(temporary), "ascii")

    def made(self, output: Path) -> None:
        """`output` was made of them: `remove_those_of(output)` removes them."""
        with _alone(self.folder), new_file(self.folder / MADE) as temporary:
            temporary.write_text(sha256_of(output), "ascii")

    def clear(self) -> None:
        """Remove the checkpoints."""
        _remove(self.folder)

    def _epochs(self) -> list[Path]:
        return sorted(self.folder.glob("epoch-*.pt"))

    def _read(self, path: Path) -> Any:
        import torch  # not above, since those who only remove checkpoints need no torch

        return torch.load(path, "cpu", weights_only=True) if _undamaged(path) else None


def remove_those_of(output: Path) -> None:
    """Remove the checkpoints that `output` was made of: its reader calls this, once it is recorded."""
    sha256 = sha256_of(output).encode()
    for folder in cache_dir("checkpoints").iterdir():
        with _alone(folder):
            made = folder / MADE
            if made.is_file() and made.read_bytes() == sha256:
                shutil.rmtree(folder, ignore_errors=True)


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another run has just removed it
        return 0


def _remove(folder: Path) -> None:
    with _alone(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _alone(folder: Path) -> AcquireReturnProxy[FileLock]:
    """No other run writes there meanwhile: one in another working folder may have the same inputs, and so the same checkpoints."""
    return FileLock(cache_dir("locks") / f"{folder.name}-checkpoints.lock").acquire()


def _save(value: Any, path: Path) -> None:
    import torch

    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch hides a full disk in an error of its own
        raise error.__context__ or error from None


def _sha256_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _undamaged(path: Path) -> bool:
    recorded = _sha256_file(path)
    if recorded.is_file() and recorded.read_bytes() == sha256_of(path).encode():
        return True
    log.warning("train: checkpoint %s is damaged (its sha256 differs): going on without it", path.name)
    return False
