"""A checkpoint after each epoch, from which a killed training resumes bit for bit (on a GPU: nearly so).

Checkpoints lie outside DVC's outputs, which are removed before a stage runs, in a folder named by a hash of all that
the training depends on: equal inputs resume, anything else starts from scratch. Beside each file lies its SHA-256, for
torch.load does not notice flipped bits; a file that differs from its SHA-256 is left out. Files hold tensors and plain
values, which are read without executing code.
"""

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from filelock import FileLock

from breedline.files import cache_dir, new_file, sha256_of
from breedline.history import History
from breedline.tables import write_json

log = logging.getLogger("breedline")

EPOCHS_KEPT = 2
"""Checkpoints kept per training: the last, and the one before it in case the last is damaged."""
TRAININGS_KEPT = 4
"""Unfinished trainings whose checkpoints are kept, the running one included."""


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        """`inputs` is everything that the training depends on, as values that JSON can hold."""
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
        trainings = cache_dir("checkpoints")
        self.folder = trainings / key
        self.folder.mkdir(exist_ok=True)
        self.folder.touch()
        for old in sorted(trainings.iterdir(), key=lambda folder: folder.stat().st_mtime)[:-TRAININGS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> dict[str, Any] | None:
        """The state in the newest undamaged checkpoint, or None if there is none."""
        for path in reversed(self._epochs()):
            if _undamaged(path):
                state: dict[str, Any] = torch.load(path, "cpu", weights_only=True)
                return state
        return None

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        """Keep the state after `epoch` epochs, counted over both phases."""
        with _new_file_with_sha256(self.folder / f"{epoch:06d}.pt") as temporary:
            torch.save(state, temporary)
        for old in self._epochs()[:-EPOCHS_KEPT]:
            old.unlink(missing_ok=True)
            _sha256_file(old).unlink(missing_ok=True)

    def noted(self, name: str) -> Any:
        """The value stored by `note`, or None if there is none or its file is damaged."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() and _undamaged(path) else None

    def note(self, name: str, value: Any) -> None:
        """Store a small value beside the checkpoints, to be removed with them."""
        with _new_file_with_sha256(self.folder / f"{name}.json") as temporary:
            write_json(value, temporary)

    def clear(self) -> None:
        """Remove the checkpoints: the training has finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _epochs(self) -> list[Path]:
        return sorted(self.folder.glob("*.pt"))


@contextmanager
def _new_file_with_sha256(path: Path) -> Iterator[Path]:
    # a run in another folder may have the same inputs, and so the same checkpoints
    with FileLock(path.parent / ".lock"), new_file(path) as temporary:
        yield temporary
        # written before the file gets its name, so that a kill in between leaves no file without a SHA-256
        _sha256_file(path).write_text(sha256_of(temporary), "ascii")


def _sha256_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _undamaged(path: Path) -> bool:
    recorded = _sha256_file(path)
    if recorded.is_file() and recorded.read_bytes() == sha256_of(path).encode():
        return True
    log.warning("train: checkpoint %s is damaged (its sha256 differs): going on without it", path.name)
    return False


class Resume(Callback):
    """Saves a checkpoint after each epoch, and restores the given one before the first epoch that is not skipped.

    A training resumed after epoch k runs through the same calls as an uninterrupted one (stages.train.fine_tune), but
    `fit(start_epoch=k)` makes fastai's SkipToEpoch cancel the first k epochs. The order of what happens then:

    1. `Checkpoints.latest()` reads the state; the model's weights and the History are restored at once.
    2. `freeze` / `unfreeze` create the optimizer of the phase, and `fit` its schedule over all epochs of the phase.
    3. Skipped epochs end without `before_train` or `after_train`, so nothing is restored or saved in them.
    4. The first `before_train` restores all else: optimizer, moving average of the loss, every RNG state. Not earlier,
       because step 2 clears the optimizer's state and resets the average.
    """

    order = 65  # after History, whose record is part of a checkpoint, and before SkipToEpoch

    def __init__(self, checkpoints: Checkpoints, history: History, state: dict[str, Any] | None) -> None:
        self.checkpoints, self.history, self.state = checkpoints, history, state

    def before_train(self) -> None:
        if self.state:
            _restore(self.learn, self.state)
            if self.epoch == 0:  # the checkpoint ended the frozen phase; the next one starts with a fresh optimizer
                self.learn.opt.clear_state()
                self.recorder.smooth_loss.reset()
            self.state = None

    def after_train(self) -> None:
        self.trained = True

    def after_epoch(self) -> None:
        if getattr(self, "trained", False):  # not in a skipped epoch, which fastai ends like any other
            self.checkpoints.save(len(self.history.epochs), {**_state(self.learn), "history": self.history.state()})


def _state(learn: Learner) -> dict[str, Any]:
    """All that decides how the training goes on: weights, optimizer, every RNG state, moving average of the loss.

    Hyper-parameters of the optimizer (learning rates, momentum) are left out: the schedule sets them at every step.
    """
    average = learn.recorder.smooth_loss
    name, words, *rest = np.random.get_state(legacy=True)
    return {
        "model": learn.model.state_dict(),
        "optimizer": learn.opt.state_dict()["state"],
        "average": {"val": average.val.as_subclass(torch.Tensor), "count": average.count},
        "rng": {
            "python": random.getstate(),
            "loader": learn.dls.train.rng.getstate(),
            "numpy": (name, torch.from_numpy(np.asarray(words, dtype=np.int64)), *rest),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
        },
    }


def _restore(learn: Learner, state: dict[str, Any]) -> None:
    learn.model.load_state_dict(state["model"])
    learn.opt.load_state_dict({**learn.opt.state_dict(), "state": state["optimizer"]})
    vars(learn.recorder.smooth_loss).update(state["average"])
    rng = state["rng"]
    random.setstate(rng["python"])
    learn.dls.train.rng.setstate(rng["loader"])
    name, words, *rest = rng["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(rng["torch"])
    torch.cuda.set_rng_state_all(rng["cuda"])
