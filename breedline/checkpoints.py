"""Where a training is after each epoch, so that a killed one goes on from there, bit for bit.

Checkpoints lie outside DVC's outputs, which are removed before a stage runs, under a hash of all that the training
depends on: equal inputs go on exactly where they were, anything else starts clean. They hold tensors and plain values,
which are read without executing code.
"""

import contextlib
import hashlib
import json
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner

from breedline.files import cache_dir, new_file
from breedline.history import History
from breedline.tables import write_json

EPOCHS_KEPT = 2
"""Of one training: the last, and the one before it in case that cannot be read."""
TRAININGS_KEPT = 4
"""That have not finished, the one at work included."""


class Checkpoints:
    """The checkpoints of one training."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        """`inputs` is everything that the training depends on, in values that JSON knows."""
        key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
        trainings = cache_dir("checkpoints")
        self.folder = trainings / key
        self.folder.mkdir(exist_ok=True)
        self.folder.touch()
        for old in sorted(trainings.iterdir(), key=lambda folder: folder.stat().st_mtime)[:-TRAININGS_KEPT]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> dict[str, Any] | None:
        """The last one that can be read; None where there is none."""
        for path in reversed(self._epochs()):
            if zipfile.is_zipfile(path):  # torch takes anything else for a format of long ago
                with contextlib.suppress(RuntimeError):  # it was whole when it was written, so the disk is not
                    state: dict[str, Any] = torch.load(path, "cpu", weights_only=True)
                    return state
            path.unlink()
        return None

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        """Keep the state after `epoch` epochs, those of both phases counted."""
        with new_file(self.folder / f"{epoch:06d}.pt") as temporary:
            torch.save(state, temporary)
        for old in self._epochs()[:-EPOCHS_KEPT]:
            old.unlink()

    def noted(self, name: str) -> Any:
        """What was kept by `note`; None where nothing was."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else None

    def note(self, name: str, value: Any) -> None:
        """Keep a value for as long as the checkpoints."""
        write_json(value, self.folder / f"{name}.json")

    def clear(self) -> None:
        """The training has finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _epochs(self) -> list[Path]:
        return sorted(self.folder.glob("*.pt"))


class Resume(Callback):
    """Leaves a checkpoint after each epoch; before the first one that is trained, takes up the one it was given."""

    order = 65  # after History, whose record is part of a checkpoint, and before fastai's SkipToEpoch

    def __init__(self, checkpoints: Checkpoints, history: History, state: dict[str, Any] | None) -> None:
        self.checkpoints, self.history, self.state = checkpoints, history, state

    def before_train(self) -> None:
        if self.state:
            _restore(self.learn, self.state)
            if self.epoch == 0:  # a phase begins with a clean optimizer and a clean average
                self.learn.opt.clear_state()
                self.recorder.smooth_loss.reset()
            self.state = None

    def after_train(self) -> None:
        self.trained = True

    def after_epoch(self) -> None:
        if getattr(self, "trained", False):  # an epoch that is skipped ends, too
            self.checkpoints.save(len(self.history.epochs), {**_state(self.learn), "history": self.history.state()})


def _state(learn: Learner) -> dict[str, Any]:
    """All that decides how the training goes on: model, optimizer, every source of chance; and the loss's moving average.

    The optimizer's hyper-parameters are not among it: the schedule sets them at every step.
    """
    average = learn.recorder.smooth_loss
    name, words, *rest = np.random.get_state(legacy=True)
    return {
        "model": learn.model.state_dict(),
        "optimizer": learn.opt.state_dict()["state"],
        "average": {"val": average.val.as_subclass(torch.Tensor), "count": average.count},
        "chance": {
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
    chance = state["chance"]
    random.setstate(chance["python"])
    learn.dls.train.rng.setstate(chance["loader"])
    name, words, *rest = chance["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(chance["torch"])
    torch.cuda.set_rng_state_all(chance["cuda"])
