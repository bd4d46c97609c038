"""Train a classifier on the presized images: a head is fitted to a pretrained body, then all is fine-tuned."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from breedline.checkpoints import Checkpoints
from breedline.code import sha256_of_code
from breedline.device import choose_kernels, machine, pick_device, pick_precision
from breedline.edge import run
from breedline.errors import BreedlineError
from breedline.files import sha256_of
from breedline.interpolation import best, publish_best
from breedline.items import Item, load_items
from breedline.params import Train
from breedline.pixels import Store
from breedline.pretrained import NOTE, read_note
from breedline.probe import Head, fit_head
from breedline.ranks import rank
from breedline.shards import INDEX, PRESIZED_COLUMNS, ShardSet
from breedline.tables import read_csv, write_json
from breedline.together import one_process_for_each_gpu, together, wait
from breedline.trained import WEIGHTS, TrainedSpec, save_trained
from breedline.training import Training
from breedline.views import Geometry, max_side
from breedline.zoo import statistics

log = logging.getLogger("breedline")


def train(
    params: Train,
    presized: Path,
    labels: Path,
    weights: Path,
    item_size: int,
    *,
    trained: Path,
    metrics: Path,
    report: Path,
) -> None:
    """Train on split `train`, watch split `valid`, and write the trained model.

    The checkpoints stay until evaluate has read the model; until then, an equal training has its result at once.

    Args:
        item_size: pixels of the square that is cropped from each presized image (presize.shorter_side).
        trained: folder for the model.
        metrics: loss and accuracy of what is published, of the head alone and of the fine-tuned model, and what the
            result depends on besides its inputs.
        report: folder for DVCLive's log, pictures of the training and of a batch, and fastai's summary of the DataBlock.

    Raises:
        BreedlineError: weights that do not fit the architecture, a split or class without images, too little memory, or
            no compiler.
    """
    table = read_csv(labels, ["name", "label", "split", "sha256"])
    images = ShardSet(presized, PRESIZED_COLUMNS)
    items = [item for item in load_items(images, table) if item.split != "test"]
    classes = sorted(table["label"].unique())
    _check(items, classes)
    device = pick_device()
    store = Store(images, device, max_side(item_size, params.image_size))
    trained_on, watched = ([item for item in items if item.split == split] for split in ("train", "valid"))
    store.keep(trained_on, params.keep_images, watched, params.image_size)
    precision = pick_precision(params.precision, device)
    choose_kernels(device, params.deterministic)
    geometry = Geometry(item_size, params.image_size, *statistics(params.arch))
    data = {"labels": labels, "presized": presized / INDEX, "weights": weights / NOTE}
    spec = TrainedSpec(
        arch=params.arch,
        classes=classes,
        geometry=geometry,
        augment=params.augment,
        pretrained=read_note(weights).source,
        loss=params.loss,
        data={name: sha256_of(path) for name, path in data.items()},
        code=sha256_of_code(Path(__file__)),
    )
    computed_on = machine(device, precision)
    checkpoints = Checkpoints({"params": params.model_dump(), "spec": spec.model_dump(), "machine": computed_on})
    with together(device), _report(report) as own_report:
        training = Training(params, classes, items, geometry, weights, store, precision, checkpoints, own_report)
        head = _head(training) if params.freeze_epochs == "fit" else None
        model, numbers = training.until_it_fits(_train_all, head)
    if rank() > 0:
        return
    write_json({**numbers, "batch_size": training.batch_size, "machine": computed_on}, metrics)
    save_trained(trained, model, spec)
    checkpoints.made(trained / WEIGHTS)
    if device.type == "cuda":
        log.info("train: at most %.1f GB of the GPU's memory", torch.cuda.max_memory_allocated() / 1e9)


@contextmanager
def _report(folder: Path) -> Iterator[Path]:
    """The folder for the report, emptied; for other processes than the first, one that is thrown away."""
    if rank() > 0:
        with TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    shutil.rmtree(folder, ignore_errors=True)  # not by `new_folder`: it can be watched while the training runs
    folder.mkdir(parents=True)
    yield folder


def _head(training: Training) -> Head | None:
    """The fitted head; other processes than the first find it in its checkpoint."""
    if rank() > 0:
        wait()
    head = training.until_it_fits(fit_head)
    if rank() == 0:
        wait()
    return head


def _train_all(training: Training, part: int, head: Head | None) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model to publish, and its numbers: the head alone, fine-tuned, or an average of both."""
    start, _ = training.model()
    if head:
        head.put_on(start)
    if training.params.epochs == 0:
        return start, {**(head.scores if head else {}), "epochs": 0}
    # imported here, as fastai takes as long as all else; meanwhile the first images have been decoded
    from breedline.finetune import fine_tune

    tuned = fine_tune(training, part, head)
    last = {name: value for name, value in tuned.history.epochs[-1].items() if name != "learning_rate"}
    numbers = {**last, "epochs": len(tuned.history.epochs), "base_lr": tuned.base_lr, "lr_find": tuned.lr_find}
    if head is None or rank() > 0:
        return tuned.model, numbers
    scores = publish_best(training, part, tuned.model, start.state_dict())
    share = best(scores)
    log.info(
        "train: valid loss %.4f with the head alone, %.4f fine-tuned; published with %.0f %% of the way: %.4f, accuracy %.4f",
        *(scores[0.0]["valid_loss"], scores[1.0]["valid_loss"], 100 * share, *scores[share].values()),
    )
    compared = {"head": scores[0.0], "fine_tuned": scores[1.0], "share": share, "penalty": head.penalty}
    return tuned.model, {**numbers, **scores[share], **compared}


def _check(items: list[Item], classes: list[str]) -> None:
    for split in ("train", "valid"):
        if not any(item.split == split for item in items):
            raise BreedlineError(f"split {split} has no images: raise label.valid_pct, or add images")
    if missing := sorted(set(classes) - {item.label for item in items if item.split == "train"}):
        raise BreedlineError(
            f"no image of {', '.join(missing[:5])} is left to train on: data/presized/rejected.csv and data/labels.csv say why"
        )


if __name__ == "__main__":
    one_process_for_each_gpu("stages.train")
    run(train)
