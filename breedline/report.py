"""What a training says while it runs: batches for the bar, a line for each epoch, and the live log that DVC plots."""

import logging
import time
from collections.abc import Callable
from typing import Any

from dvclive import Live
from fastai.callback.core import Callback

log = logging.getLogger("breedline")


class Report(Callback):
    """Follows a Learner through both phases as one history."""

    order = 60  # after fastai's Recorder, whose numbers it reads

    def __init__(self, live: Live, epochs: int, advance: Callable[[int], None]) -> None:
        self.live, self.epochs, self.advance = live, epochs, advance
        self._began: float | None = None
        self.history: list[dict[str, float]] = []
        """One entry an epoch: train_loss, valid_loss, accuracy, learning_rate (of the head, at its end)."""
        self.schedule: list[list[float]] = []
        """One entry a step: the learning rates of the first and the last layer group, and the momentum."""

    def state(self) -> dict[str, Any]:
        """What `take_up` needs."""
        return {"history": self.history, "schedule": self.schedule}

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on with the history of a training that was killed; the live log has it again."""
        for epoch in state["history"]:
            self._log(epoch)
        self.schedule = state["schedule"]
        self.advance(sum(self._batches() for _ in self.history))

    def before_train(self) -> None:
        self._began = time.monotonic()

    def after_batch(self) -> None:
        self.advance(1)
        if self.training:
            hypers = self.opt.hypers
            self.schedule.append([float(hypers[0]["lr"]), float(hypers[-1]["lr"]), float(hypers[-1]["mom"])])

    def after_epoch(self) -> None:
        if self._began is None:  # one that a resumed training leaves out
            return
        seconds, self._began = time.monotonic() - self._began, None
        values = dict(zip(self.recorder.metric_names[1:], self.recorder.log[1:], strict=False))
        epoch = {name: round(float(values[name]), 6) for name in ("train_loss", "valid_loss", "accuracy")}
        self._log({**epoch, "learning_rate": float(self.opt.hypers[-1]["lr"])})
        log.info(
            "epoch %d/%d: train loss %.4f, valid loss %.4f, accuracy %.4f, %.2f s",
            *(len(self.history), self.epochs, *epoch.values(), seconds),
        )

    def _log(self, epoch: dict[str, float]) -> None:
        self.history.append(epoch)
        for name, value in epoch.items():
            self.live.log_metric(name, value)
        self.live.next_step()

    def _batches(self) -> int:
        return len(self.dls.train) + len(self.dls.valid)
