"""Fine-tune a classifier on the presized images: fastai's `fine_tune`, its two phases spelled out."""

import contextlib
import logging
import shutil
import tempfile
from pathlib import Path

import torch
from dvclive import Live
from fastai.callback.schedule import minimum, steep, valley
from fastai.learner import Learner
from fastai.torch_core import set_seed

from breedline.bundle import BundleSpec, save_bundle
from breedline.edge import run
from breedline.errors import BreedlineError
from breedline.files import read_csv, sha256_of, sha256_of_code, write_json
from breedline.learner import (
    Geometry,
    Item,
    create_learner,
    create_model,
    data_block,
    load_items,
    load_weights,
    loss_function,
    pick_device,
    pick_precision,
    statistics,
)
from breedline.params import WEIGHTS_NOTE, Train
from breedline.pictures import batch_picture, finder_picture, loss_picture
from breedline.progress import progress
from breedline.report import Report
from breedline.shards import INDEX

log = logging.getLogger("breedline")
LR_RATIO = 100
"""How much less the earliest layers learn than the head, as in `fine_tune`."""


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
        report: folder for the live log, the plots, a batch as the model sees it, and the DataBlock in words.

    Raises:
        BreedlineError: no such architecture, weights that do not fit it, or a split without images.
    """
    table = read_csv(labels, ["name", "label", "split", "sha256"])
    items = [item for item in load_items(presized, table) if item.split != "test"]
    classes = sorted(table["label"].unique())
    _check(items, classes)
    device = pick_device()
    precision = pick_precision(params.precision, device)

    set_seed(params.seed, reproducible=True)
    model = create_model(params.arch, len(classes))
    pretrained = load_weights(model, params.arch, weights)
    geometry = Geometry(item_size, params.image_size, *statistics(params.arch))
    block = data_block(presized, classes, geometry, params.augment)
    in_training = sum(item.split == "train" for item in items)
    dls = block.dataloaders(
        items, bs=min(params.batch_size, in_training), num_workers=params.num_workers, device=device
    )
    loss = loss_function(params.loss, params.label_smoothing)
    learn = create_learner(dls, model, params.arch, loss, precision=precision, channels_last=params.channels_last)
    log.info(
        "train: %s, %s, %d classes, %d images and %d to validate, on %s in %s",
        *(params.arch, "pretrained" if pretrained else "from scratch", len(classes)),
        *(in_training, len(items) - in_training, _name(device), precision),
    )

    shutil.rmtree(report, ignore_errors=True)  # written in place, so that it can be watched
    report.mkdir(parents=True)
    _describe(block, items, report / "datablock.txt")
    batch_picture(dls, report / "show_batch.png")
    base_lr, rules = _base_lr(params, learn, report)
    set_seed(params.seed, reproducible=True)
    history = _fit(learn, params, base_lr, report / "live")
    loss_picture(history, report / "loss.png")
    write_json({**history[-1], "epochs": len(history), "base_lr": base_lr, "lr_find": rules}, metrics)
    data = {"labels": labels, "presized": presized / INDEX, "weights": weights / WEIGHTS_NOTE}
    spec = BundleSpec(
        arch=params.arch,
        classes=classes,
        geometry=geometry,
        augment=params.augment,
        loss=params.loss,
        data={name: sha256_of(path) for name, path in data.items()},
        code=sha256_of_code(),
    )
    save_bundle(bundle, learn.model, spec)


def _fit(learn: Learner, params: Train, base_lr: float, folder: Path) -> list[dict[str, float]]:
    """Fine-tune, with a bar or lines for people and a live log for DVC; the numbers of each epoch."""
    epochs = params.freeze_epochs + params.epochs
    batches = epochs * (len(learn.dls.train) + len(learn.dls.valid))
    with (
        Live(str(folder), save_dvc_exp=False, dvcyaml=False) as live,
        progress("train (batches)", batches) as advance,
        learn.no_bar(),
        learn.no_logging(),
    ):
        report = Report(live, epochs, advance)
        learn.add_cb(report)
        fine_tune(learn, params.freeze_epochs, params.epochs, base_lr)
    return report.history


def fine_tune(learn: Learner, freeze_epochs: int, epochs: int, base_lr: float) -> None:
    """fastai's `Learner.fine_tune`, phase by phase: the head alone, then everything at half the rate.

    In the second phase the learning rate falls from the head to the earliest layers, by LR_RATIO in all.
    """
    if freeze_epochs:
        learn.freeze()
        learn.fit_one_cycle(freeze_epochs, slice(base_lr), pct_start=0.99)
    learn.unfreeze()
    learn.fit_one_cycle(epochs, slice(base_lr / 2 / LR_RATIO, base_lr / 2), pct_start=0.3, div=5.0)


def _check(items: list[Item], classes: list[str]) -> None:
    for split in ("train", "valid"):
        if not any(item.split == split for item in items):
            raise BreedlineError(f"split {split} has no images: raise label.valid_pct, or add images")
    if missing := sorted(set(classes) - {item.label for item in items if item.split == "train"}):
        raise BreedlineError(
            f"no image of {', '.join(missing[:5])} is left to train on: data/presized/rejected.csv and data/labels.csv say why"
        )


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type.upper()


def _describe(block, items: list[Item], path: Path) -> None:  # type: ignore[no-untyped-def]
    """fastai's account of what each transform does to a few images of each split."""
    few = [item for split in ("train", "valid") for item in [i for i in items if i.split == split][:4]]
    with path.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        block.summary(few, bs=4, show_batch=False)


def _base_lr(params: Train, learn: Learner, folder: Path) -> tuple[float, dict[str, float]]:
    """The rate to use, and what each rule of the finder says (nothing if it was not asked)."""
    if params.base_lr != "auto":
        return params.base_lr, {}
    if params.freeze_epochs:
        learn.freeze()
    with tempfile.TemporaryDirectory() as scratch, learn.no_bar():
        learn.path = Path(scratch)
        found = learn.lr_find(suggest_funcs=(valley, steep, minimum), show_plot=False)
    rules = {"valley": found.valley, "steepest": found.steep, "minimum_tenth": found.minimum}
    finder_picture(learn.recorder, rules, folder / "lr_find.png")
    log.info("train: base_lr %.2g, the finder's valley (%s)", found.valley, rules)
    return found.valley, rules


if __name__ == "__main__":
    run(train)
