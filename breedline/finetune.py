"""Phase 2 of transfer learning: everything is fine-tuned, from a fitted head, or as fastai's `fine_tune` does it."""

import contextlib
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from dvclive import Live
from fastai.callback.schedule import minimum, steep, valley
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from breedline.augment import Transforms
from breedline.device import described, set_seed
from breedline.errors import BreedlineError
from breedline.history import History
from breedline.learner import FrozenStatistics, Graphs, InParts, Together, create_learner
from breedline.loader import PixelsDL, data_block
from breedline.pictures import batch_picture, finder_picture, loss_picture, schedule_picture
from breedline.probe import Head
from breedline.progress import progress
from breedline.ranks import world
from breedline.resume import Resume
from breedline.training import AUTO_BASE_LR, AUTO_BASE_LR_FROM_SCRATCH, Training

log = logging.getLogger("breedline")


@dataclass(frozen=True)
class FineTuned:
    """A model after its last epoch, and how it came there."""

    model: nn.Module
    history: History
    base_lr: float
    lr_find: dict[str, float]
    """The suggestion of each rule of the learning-rate finder, if it was asked."""


def fine_tune(training: Training, part: int, head: Head | None) -> FineTuned:
    """Fine-tune the model, resuming from the latest checkpoint if there is one, and draw what happened.

    Args:
        part: images in a batch; if fewer than training.batch_size, gradients are accumulated over several.
        head: the fitted head to start from; None to train a random one first.

    Raises:
        BreedlineError: no compiler for `train.compile`, weights that do not fit the architecture, or more processes that
            train together than images in a batch.
    """
    params, device = training.params, training.device
    if part < world():
        raise BreedlineError(f"{world()} processes share batches of {part} images: raise train.batch_size")
    model, pretrained = training.model()
    if head:
        head.put_on(model)
    set_seed(params.seed)
    dls = _data(training, part)
    learn = create_learner(
        dls, model, training.loss(), precision=training.precision, channels_last=params.channels_last
    )
    if pretrained and params.freeze_statistics:
        learn.add_cb(FrozenStatistics())
    if world() > 1:
        learn.add_cb(Together())
    if part < training.batch_size:
        learn.add_cb(InParts(training.batch_size))
    if params.compile == "auto":
        if device.type == "cuda" and world() == 1:
            learn.add_cb(Graphs(training.precision))
    elif params.compile != "none":
        torch.compiler.reset()
        model.compile(mode=params.compile, dynamic=False)
    freeze_epochs = 0 if params.freeze_epochs == "fit" else params.freeze_epochs
    epochs = training.epochs(pretrained)
    log.info(
        "train: %s, %s, %d classes, %d images and %d to validate, on %s in %s, batches of %d",
        *(params.arch, "pretrained" if pretrained else "from scratch", len(training.classes)),
        *(len(dls.train_ds), len(dls.valid_ds), described(device), training.precision, training.batch_size),
    )
    try:
        base_lr, lr_find = _base_lr(training, learn, pretrained, frozen=freeze_epochs > 0)
        set_seed(params.seed)
        history = _fit(training, learn, (freeze_epochs, epochs), base_lr, head)
    except BackendCompilerFailed as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise BreedlineError(
            f"train.compile: torch cannot compile here ({reason}): install a C++ compiler, or set it to none"
        ) from error
    loss_picture(history.curve, training.report / "loss.png")
    schedule_picture(history.schedule, training.report / "schedule.png")
    return FineTuned(model, history, base_lr, lr_find)


def _data(training: Training, part: int) -> DataLoaders:
    """The data loaders, described by fastai's summary of the DataBlock and by a picture of a batch."""
    transforms = Transforms(training.geometry, training.params.augment)
    block = data_block(training.store.images, training.classes, transforms)
    few = [item for split in ("train", "valid") for item in training.split(split)[0][:4]]
    with (training.report / "datablock.txt").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        block.summary(few, bs=4, show_batch=False)
    how = {"dl_type": PixelsDL, "store": training.store, "transforms": transforms}
    dls = block.dataloaders(training.items, bs=part, device=training.device, **how)
    batch_picture(dls, training.report / "show_batch.png")
    return dls


def _fit(training: Training, learn: Learner, epochs: tuple[int, int], base_lr: float, head: Head | None) -> History:
    """Run both phases, with progress for people and a log for DVC."""
    state = training.checkpoints.latest_epoch()
    total = sum(epochs)
    with (
        Live(str(training.report / "live"), save_dvc_exp=False, dvcyaml=False) as live,
        progress("train (batches)", total * (len(learn.dls.train) + len(learn.dls.valid))) as advance,
        ThreadPoolExecutor(1, "checkpoint") as writer,
        learn.no_bar(),
        learn.no_logging(),
    ):
        history = History(live, total, advance, head.scores if head else None)
        learn.add_cbs([history, Resume(training.checkpoints, history, state, writer)])
        if state:
            learn.model.load_state_dict(state["model"])
            history.restore(state["history"])
            log.info("train: resuming after epoch %d of %d", len(history.epochs), total)
        run_phases(learn, *epochs, base_lr, training.params.lr_ratio, done=len(history.epochs))
    return history


def run_phases(learn: Learner, freeze_epochs: int, epochs: int, base_lr: float, lr_ratio: float, done: int = 0) -> None:
    """fastai's `Learner.fine_tune` that can be resumed: the head alone, then all layers at half the learning rate.

    In the second phase learning rates fall geometrically from the head to the earliest layers, by `lr_ratio` in all
    (100 in `fine_tune`). `Learner.fine_tune(start_epoch=k)` would skip k epochs of each phase.

    Args:
        done: epochs to skip at the start, counted over both phases.
    """
    if done < freeze_epochs:
        learn.freeze()
        log.info("train: %d epochs of the head alone, up to learning rate %.2g", freeze_epochs, base_lr)
        learn.fit_one_cycle(freeze_epochs, slice(base_lr), pct_start=0.99, start_epoch=done)
    learn.unfreeze()
    rates = slice(base_lr / 2 / lr_ratio, base_lr / 2)
    log.info(
        "train: %d epochs of everything, up to learning rates %.2g (first layers) to %.2g (head)",
        *(epochs, rates.start, rates.stop),
    )
    learn.fit_one_cycle(epochs, rates, pct_start=0.3, div=5.0, start_epoch=max(0, done - freeze_epochs))


def _base_lr(training: Training, learn: Learner, pretrained: bool, frozen: bool) -> tuple[float, dict[str, float]]:
    """The base learning rate, and the suggestion of each rule of the finder (none if it was not asked)."""
    wanted = training.params.base_lr
    if wanted == "auto":
        return AUTO_BASE_LR if pretrained else AUTO_BASE_LR_FROM_SCRATCH, {}
    if wanted != "finder":
        return wanted, {}
    found = training.checkpoints.kept("lr_find")
    if found is None:
        found = _find_lr(learn, frozen)
        training.checkpoints.keep("lr_find", found)
    rules: dict[str, float] = found["rules"]
    finder_picture(found["lrs"], found["losses"], rules, training.report / "lr_find.png")
    said = ", ".join(f"{name} {rate:.2g}" for name, rate in rules.items())
    log.info("train: base_lr %.2g, the finder's valley: its longest fall of the loss (%s)", rules["valley"], said)
    return rules["valley"], rules


def _find_lr(learn: Learner, frozen: bool) -> dict[str, Any]:
    """Run fastai's learning-rate finder; its curve (lrs, losses) and the rate that each of its rules suggests."""
    if frozen:
        learn.freeze()
    with tempfile.TemporaryDirectory() as scratch, learn.no_bar():
        learn.path = Path(scratch)
        found = learn.lr_find(suggest_funcs=(valley, steep, minimum), show_plot=False)
    return {
        "lrs": [float(rate) for rate in learn.recorder.lrs],
        "losses": [float(loss) for loss in learn.recorder.losses],
        "rules": {"valley": found.valley, "steepest": found.steep, "minimum_tenth": found.minimum},
    }
