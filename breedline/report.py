"""What a training says while it runs: batches for the bar, a line for each epoch, and the live log that DVC plots."""

import logging
import time
from collections.abc import Callable

from dvclive import Live
from fastai.callback.core import Callback

log = logging.getLogger("breedline")


class Report(Callback):
    """Follows a Learner through both phases as one history."""

    order = 60  # after fastai's Recorder, whose numbers it reads

    def __init__(self, live: Live, epochs: int, advance: Callable[[int], None]) -> None:
        self.live, self.epochs, self.advance = live, epochs, advance
        self.history: list[dict[str, float]] = []
        """One entry an epoch: train_loss, valid_loss, accuracy."""

    def before_epoch(self) -> None:
        self._began = time.monotonic()

    def after_batch(self) -> None:
        self.advance(1)

    def after_epoch(self) -> None:
        values = dict(zip(self.recorder.metric_names[1:], self.recorder.log[1:], strict=False))
        epoch = {name: round(float(values[name]), 6) for name in ("train_loss", "valid_loss", "accuracy")}
        self.history.append(epoch)
        for name, value in epoch.items():
            self.live.log_metric(name, value)
        self.live.log_metric("learning_rate", float(self.opt.hypers[-1]["lr"]))
        self.live.next_step()
        log.info(
            "epoch %d/%d: train loss %.4f, valid loss %.4f, accuracy %.4f, %.1f s",
            *(len(self.history), self.epochs, *epoch.values(), time.monotonic() - self._began),
        )
