"""Resuming a training after its last whole epoch, from a checkpoint that a callback saves after each."""

import random
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner

from breedline.checkpoints import Checkpoints
from breedline.history import History
from breedline.together import unwrapped


class Resume(Callback):
    """Saves a checkpoint while the next epoch trains, and restores the given one before the first epoch that is not skipped.

    A training resumed after epoch k runs through the same calls as an uninterrupted one (finetune.run_phases), but
    `fit(start_epoch=k)` makes fastai's SkipToEpoch cancel the first k epochs. The order of what happens then:

    1. `Checkpoints.latest_epoch()` reads the state; the model's weights and the History are restored at once.
    2. `freeze` / `unfreeze` create the optimizer of the phase, and `fit` its schedule over all epochs of the phase.
    3. Skipped epochs end without `before_train` or `after_train`, so nothing is restored or saved in them.
    4. The first `before_train` restores all else: optimizer, moving average of the loss, every RNG state. Not earlier,
       because step 2 clears the optimizer's state and resets the average.
    """

    order = 65  # after History, whose record is part of a checkpoint, and before SkipToEpoch

    def __init__(
        self, checkpoints: Checkpoints, history: History, state: dict[str, Any] | None, writer: Executor
    ) -> None:
        """`writer` is a thread, so that a GPU does not wait for the disk."""
        self.checkpoints, self.history, self.state, self.writer = checkpoints, history, state, writer
        self.writing: Future[None] | None = None

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
            state = _copy({**_state(self.learn), "history": self.history.state()})
            self._wait()
            self.writing = self.writer.submit(self.checkpoints.keep_epoch, len(self.history.epochs), state)

    def after_fit(self) -> None:
        self._wait()

    def _wait(self) -> None:
        """Until the last checkpoint is written; raises what went wrong with it."""
        if self.writing:
            self.writing.result()


def _state(learn: Learner) -> dict[str, Any]:
    """All that decides how the training goes on: weights, optimizer, every RNG state, moving average of the loss.

    Hyper-parameters of the optimizer (learning rates, momentum) are left out: the schedule sets them at every step.
    """
    average = learn.recorder.smooth_loss
    name, words, *rest = np.random.get_state(legacy=True)
    return {
        "model": unwrapped(learn.model).state_dict(),
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


def _copy(value: Any) -> Any:
    """The state as it is now, its tensors in memory."""
    if isinstance(value, torch.Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(each) for key, each in value.items()}
    return [_copy(each) for each in value] if isinstance(value, list) else value


def _restore(learn: Learner, state: dict[str, Any]) -> None:
    unwrapped(learn.model).load_state_dict(state["model"])
    learn.opt.load_state_dict({**learn.opt.state_dict(), "state": state["optimizer"]})
    vars(learn.recorder.smooth_loss).update(state["average"])
    rng = state["rng"]
    random.setstate(rng["python"])
    learn.dls.train.rng.setstate(rng["loader"])
    name, words, *rest = rng["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(rng["torch"])
    torch.cuda.set_rng_state_all(rng["cuda"])
