"""What a training says while it runs: a bar or lines, and the live log that DVC plots."""

import logging
import time
from contextlib import ExitStack

from dvclive import Live
from fastai.callback.core import Callback

from breedline.progress import progress

log = logging.getLogger("breedline")


class Report(Callback):
    """Follows a Learner through both phases as one history of `epochs` epochs."""

    order = 60  # after fastai's Recorder, whose numbers it reads

    def __init__(self, live: Live, epochs: int) -> None:
        self.live, self.epochs = live, epochs
        self.history: list[dict[str, float]] = []
        """One entry an epoch: train_loss, valid_loss, accuracy."""
        self._bar = ExitStack()

    def before_fit(self) -> None:
        self._bar = ExitStack()
        batches = self.n_epoch * (len(self.dls.train) + len(self.dls.valid))
        self._advance = self._bar.enter_context(progress("train (batches)", batches))
        self._began = time.monotonic()

    def after_batch(self) -> None:
        self._advance(1)

    def after_epoch(self) -> None:
        values = dict(zip(self.recorder.metric_names[1:], self.recorder.log[1:], strict=False))
        epoch = {name: round(float(values[name]), 6) for name in ("train_loss", "valid_loss", "accuracy")}
        self.history.append(epoch)
        for name, value in epoch.items():
            self.live.log_metric(name, value, plot=True)
        self.live.log_metric("learning_rate", float(self.opt.hypers[-1]["lr"]))
        self.live.next_step()
        log.info(
            "epoch %d/%d: train loss %.4f, valid loss %.4f, accuracy %.4f, %.1f s",
            *(len(self.history), self.epochs, *epoch.values(), time.monotonic() - self._began),
        )
        self._began = time.monotonic()

    def after_fit(self) -> None:
        self._bar.close()
