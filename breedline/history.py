"""What a training reports while it runs: batches for the progress bar, a log line per epoch, DVCLive's log for plots."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from dvclive import Live
from fastai.callback.core import Callback

from breedline.errors import BreedlineError

log = logging.getLogger("breedline")


class History(Callback):
    """Records and reports both phases of a training as one run; epochs count from 1."""

    order = 60  # after fastai's Recorder, whose values it reads

    def __init__(
        self, live: Live, n_epochs: int, advance: Callable[[int], None], head: dict[str, float] | None = None
    ) -> None:
        """`n_epochs` is the total of both phases; `advance` moves the progress bar by a number of batches.

        Args:
            head: valid_loss and accuracy of the fitted head that the training starts from; they count as epoch 0.
        """
        self.live, self.n_epochs, self.advance, self.head = live, n_epochs, advance, head
        self.live.step = 0 if head else 1
        if head:
            self._report(head)
        self._began: float | None = None
        self.epochs: list[dict[str, float]] = []
        """One entry per finished epoch: train_loss, valid_loss, accuracy, learning_rate (of the head, at its end)."""
        self.schedule: list[list[float]] = []
        """One entry per training batch: learning rates of the first and the last layer group, and the momentum."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold for `restore`."""
        return {"epochs": self.epochs, "schedule": self.schedule}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue the history of an interrupted training, and write its epochs to the new live log."""
        for epoch in state["epochs"]:
            self._log(epoch)
        self.schedule = state["schedule"]
        self.advance(sum(self._batches() for _ in self.epochs))

    def before_train(self) -> None:
        self._began = time.monotonic()

    def after_batch(self) -> None:
        self.advance(1)
        if self.training:
            hypers = self.opt.hypers
            self.schedule.append([float(hypers[0]["lr"]), float(hypers[-1]["lr"]), float(hypers[-1]["mom"])])

    def after_epoch(self) -> None:
        if self._began is None:  # skipped by a resumed training: fastai still ends the epoch
            return
        seconds, self._began = time.monotonic() - self._began, None
        values = dict(zip(self.recorder.metric_names[1:], self.recorder.log[1:], strict=False))
        epoch = {name: round(float(values[name]), 6) for name in ("train_loss", "valid_loss", "accuracy")}
        if not all(map(math.isfinite, epoch.values())):
            raise BreedlineError(
                f"the loss is no number any more after epoch {len(self.epochs) + 1}: choose a smaller train.base_lr"
            )
        self._log({**epoch, "learning_rate": float(self.opt.hypers[-1]["lr"])})
        log.info(
            "epoch %d/%d: train loss %.4f, valid loss %.4f, accuracy %.4f, %.2f s",
            *(len(self.epochs), self.n_epochs, *epoch.values(), seconds),
        )

    @property
    def curve(self) -> dict[int, dict[str, float]]:
        """What was reported of each epoch, by its number."""
        return {**({0: self.head} if self.head else {}), **dict(enumerate(self.epochs, 1))}

    def _log(self, epoch: dict[str, float]) -> None:
        self.epochs.append(epoch)
        self._report(epoch)

    def _report(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.live.log_metric(name, value)
        self.live.next_step()

    def _batches(self) -> int:
        return len(self.dls.train) + len(self.dls.valid)
