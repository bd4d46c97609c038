"""Fine-tune a classifier on the presized images: fastai's `fine_tune`, as two phases that can be resumed."""

import contextlib
import gc
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from dvclive import Live
from fastai.callback.schedule import minimum, steep, valley
from fastai.learner import Learner
from fastai.torch_core import set_seed
from torch._dynamo.exc import BackendCompilerFailed

from breedline.bundle import BundleSpec, save_bundle
from breedline.checkpoints import Checkpoints, Resume
from breedline.code import sha256_of_code
from breedline.edge import run
from breedline.errors import BreedlineError
from breedline.files import sha256_of
from breedline.history import History
from breedline.items import Item, load_items
from breedline.learner import (
    Geometry,
    InParts,
    create_learner,
    create_model,
    data_block,
    device_name,
    leave_autocast,
    load_weights,
    loss_function,
    machine,
    pick_device,
    pick_precision,
    prefer_speed,
    statistics,
)
from breedline.loader import PixelsDL
from breedline.params import Train
from breedline.pictures import batch_picture, finder_picture, loss_picture, schedule_picture
from breedline.pixels import Store
from breedline.pretrained import NOTE
from breedline.progress import progress
from breedline.shards import INDEX
from breedline.tables import read_csv, write_json

log = logging.getLogger("breedline")
T = TypeVar("T")
LR_RATIO = 100
"""Learning rate of the head over that of the earliest layers, as in `fine_tune`."""


def train(
    params: Train,
    presized: Path,
    labels: Path,
    weights: Path,
    item_size: int,
    *,
    bundle: Path,
    metrics: Path,
    report: Path,
) -> None:
    """Train on split `train`, watch split `valid`, and write the model bundle.

    Args:
        item_size: pixels of the square that is cropped from each presized image (presize.shorter_side).
        bundle: folder for the model.
        metrics: loss and accuracy of the last epoch, and what the result depends on besides its inputs.
        report: folder for DVCLive's log, pictures of the training and of a batch, and fastai's summary of the DataBlock.

    Raises:
        BreedlineError: weights that do not fit the architecture, a split or class without images, too little memory, or
            no compiler.
    """
    table = read_csv(labels, ["name", "label", "split", "sha256"])
    items = [item for item in load_items(presized, table) if item.split != "test"]
    classes = sorted(table["label"].unique())
    _check(items, classes)
    device = pick_device()
    geometry = Geometry(item_size, params.image_size, *statistics(params.arch))
    data = {"labels": labels, "presized": presized / INDEX, "weights": weights / NOTE}
    spec = BundleSpec(
        arch=params.arch,
        classes=classes,
        geometry=geometry,
        augment=params.augment,
        loss=params.loss,
        data={name: sha256_of(path) for name, path in data.items()},
        code=sha256_of_code(Path(__file__)),
    )
    precision = pick_precision(params.precision, device)
    computed_on = machine(device, precision)
    checkpoints = Checkpoints({"params": params.model_dump(), "spec": spec.model_dump(), "machine": computed_on})
    block = data_block(presized, classes, geometry, params.augment)
    store = Store(presized, device, max_side=geometry.max_side)
    store.keep(items, params.keep_images)
    shutil.rmtree(report, ignore_errors=True)  # not by `new_folder`: it can be watched while the training runs
    report.mkdir(parents=True)
    _describe(block, items, report / "datablock.txt")
    batch_size = min(params.batch_size, sum(item.split == "train" for item in items))

    def attempt(part: int) -> tuple[Learner, History, float, dict[str, float]]:
        _seed(params, device)
        model = create_model(params.arch, len(classes))
        pretrained = load_weights(model, params.arch, weights)
        dls = block.dataloaders(items, bs=part, device=device, dl_type=PixelsDL, store=store)
        log.info(
            "train: %s, %s, %d classes, %d images and %d to validate, on %s in %s",
            *(params.arch, "pretrained" if pretrained else "from scratch", len(classes)),
            *(len(dls.train_ds), len(dls.valid_ds), _name(device), precision),
        )
        batch_picture(dls, report / "show_batch.png")
        loss = loss_function(params.loss, params.label_smoothing)
        learn = create_learner(dls, model, params.arch, loss, precision=precision, channels_last=params.channels_last)
        if part < batch_size:
            learn.add_cb(InParts(batch_size))
        if params.compile != "none":
            torch.compiler.reset()
            model.compile(mode=params.compile, dynamic=False)
        base_lr, rules = _base_lr(params, learn, checkpoints, report)
        _seed(params, device)
        return learn, _fit(learn, params, base_lr, checkpoints, report / "live"), base_lr, rules

    try:
        learn, history, base_lr, rules = _until_it_fits(attempt, batch_size, checkpoints, device)
    except BackendCompilerFailed as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        raise BreedlineError(
            f"train.compile: torch cannot compile here ({reason}): install a C++ compiler, or set it to none"
        ) from error
    loss_picture(history.epochs, report / "loss.png")
    schedule_picture(history.schedule, report / "schedule.png")
    last = {name: value for name, value in history.epochs[-1].items() if name != "learning_rate"}
    numbers = {**last, "epochs": len(history.epochs), "base_lr": base_lr, "lr_find": rules}
    write_json({**numbers, "machine": computed_on}, metrics)
    save_bundle(bundle, learn.model, spec)
    if device.type == "cuda":
        log.info("train: at most %.1f GB of the GPU's memory", torch.cuda.max_memory_allocated() / 1e9)
    checkpoints.clear()


def _until_it_fits(attempt: Callable[[int], T], batch_size: int, checkpoints: Checkpoints, device: torch.device) -> T:
    """Call `attempt` with the batch size; after each out-of-memory error, with half of it, gradients accumulated.

    Raises:
        BreedlineError: not even two images fit, the least that batch normalisation can train on.
    """
    part: int = checkpoints.noted("part") or batch_size
    while True:
        try:
            return attempt(part)
        except torch.OutOfMemoryError:
            if part <= 2:
                raise BreedlineError(
                    f"the memory of {_name(device)} is too small for two images at a time: "
                    "choose a smaller train.image_size or train.arch"
                ) from None
        part = -(-part // 2)
        checkpoints.note("part", part)
        log.warning("train: out of memory: batches of %d from now on in parts of %d", batch_size, part)
        leave_autocast(device)
        gc.collect()
        torch.cuda.empty_cache()


def _seed(params: Train, device: torch.device) -> None:
    set_seed(params.seed, reproducible=True)
    if not params.deterministic:
        prefer_speed(device)


def _fit(learn: Learner, params: Train, base_lr: float, checkpoints: Checkpoints, folder: Path) -> History:
    """Fine-tune, resuming from the latest checkpoint if there is one; with progress for people and a log for DVC."""
    epochs = params.freeze_epochs + params.epochs
    state = checkpoints.latest()
    with (
        Live(str(folder), save_dvc_exp=False, dvcyaml=False) as live,
        progress("train (batches)", epochs * (len(learn.dls.train) + len(learn.dls.valid))) as advance,
        learn.no_bar(),
        learn.no_logging(),
    ):
        history = History(live, epochs, advance)
        learn.add_cbs([history, Resume(checkpoints, history, state)])
        if state:
            learn.model.load_state_dict(state["model"])
            history.restore(state["history"])
            log.info("train: resuming after epoch %d of %d", len(history.epochs), epochs)
        fine_tune(learn, params.freeze_epochs, params.epochs, base_lr, done=len(history.epochs))
    return history


def fine_tune(learn: Learner, freeze_epochs: int, epochs: int, base_lr: float, done: int = 0) -> None:
    """fastai's `Learner.fine_tune` that can be resumed: the head alone, then all layers at half the learning rate.

    In the second phase learning rates fall geometrically from the head to the earliest layers, by LR_RATIO in all.
    `Learner.fine_tune(start_epoch=k)` would skip k epochs of each phase.

    Args:
        done: epochs to skip at the start, counted over both phases.
    """
    if done < freeze_epochs:
        learn.freeze()
        log.info("train: %d epochs of the head alone, up to learning rate %.2g", freeze_epochs, base_lr)
        learn.fit_one_cycle(freeze_epochs, slice(base_lr), pct_start=0.99, start_epoch=done)
    learn.unfreeze()
    rates = slice(base_lr / 2 / LR_RATIO, base_lr / 2)
    learn.opt.set_hyper("lr", rates)
    groups = ", ".join(f"{hyper['lr']:.2g}" for hyper in learn.opt.hypers)
    log.info(
        "train: %d epochs of everything, up to learning rates %s from the first layers to the head", epochs, groups
    )
    learn.fit_one_cycle(epochs, rates, pct_start=0.3, div=5.0, start_epoch=max(0, done - freeze_epochs))


def _check(items: list[Item], classes: list[str]) -> None:
    for split in ("train", "valid"):
        if not any(item.split == split for item in items):
            raise BreedlineError(f"split {split} has no images: raise label.valid_pct, or add images")
    if missing := sorted(set(classes) - {item.label for item in items if item.split == "train"}):
        raise BreedlineError(
            f"no image of {', '.join(missing[:5])} is left to train on: data/presized/rejected.csv and data/labels.csv say why"
        )


def _name(device: torch.device) -> str:
    return f"the CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device_name(device)


def _describe(block, items: list[Item], path: Path) -> None:  # type: ignore[no-untyped-def]
    """Write fastai's summary of the DataBlock: what each transform does to a few images of each split."""
    few = [item for split in ("train", "valid") for item in [i for i in items if i.split == split][:4]]
    with path.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        block.summary(few, bs=4, show_batch=False)


def _base_lr(params: Train, learn: Learner, checkpoints: Checkpoints, folder: Path) -> tuple[float, dict[str, float]]:
    """The base learning rate, and the suggestion of each rule of the finder (none if the rate is set in params)."""
    if params.base_lr != "auto":
        return params.base_lr, {}
    found = checkpoints.noted("lr_find")
    if found is None:
        found = _find_lr(learn, frozen=params.freeze_epochs > 0)
        checkpoints.note("lr_find", found)
    rules: dict[str, float] = found["rules"]
    finder_picture(found["lrs"], found["losses"], rules, folder / "lr_find.png")
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


if __name__ == "__main__":
    run(train)
