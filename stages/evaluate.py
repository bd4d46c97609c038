"""Metrics of a bundle on images that training never saw, and what to look at next."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.torch_core import set_seed

from breedline.bundle import BundleSpec, load_bundle
from breedline.edge import run
from breedline.errors import BreedlineError
from breedline.files import new_folder
from breedline.items import Item, load_items
from breedline.learner import data_block, loss_function, pick_device
from breedline.loader import View
from breedline.metrics import confused_pairs, confusion, per_class, summary
from breedline.params import Evaluate
from breedline.pictures import MAX_CLASSES, confusion_picture, f1_picture, sheet_picture, short
from breedline.pixels import Store
from breedline.progress import progress
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from breedline.tables import read_csv, write_csv, write_json

log = logging.getLogger("breedline")
SEED = 0
"""Seed of the augmented views."""
PLAIN_WEIGHT = 0.25
"""Weight of the plain view in test-time augmentation; the mean of the augmented ones has the rest."""


def evaluate(params: Evaluate, bundle: Path, presized: Path, labels: Path, *, metrics: Path, report: Path) -> None:
    """Compare the bundle's predictions with the labels of the splits `test` and `valid`.

    Args:
        metrics: those of both splits, as nested JSON.
        report: folder for the test split's predictions, its scores per class, the pairs of classes most often confused,
            pictures of the confusion matrix and the F1 per class, and a sheet of the worst mistakes.

    Raises:
        BreedlineError: no usable bundle, or no test images, or a label that the bundle does not know.
    """
    model, spec = load_bundle(bundle)
    items = load_items(presized, read_csv(labels, ["name", "label", "split", "sha256"]))
    if not any(item.split == "test" for item in items):
        raise BreedlineError("split test has no images: raise label.test_pct, or mend label.test_list")
    if unknown := sorted({item.label for item in items} - set(spec.classes)):
        raise BreedlineError(
            f"the bundle does not know the class {', '.join(unknown[:5])}: `dvc repro train` makes a new one"
        )

    numbers: dict[str, Any] = {}
    for split in ("test", "valid"):
        chosen = [item for item in items if item.split == split]
        if not chosen:
            continue
        probabilities = predict(params, model, spec, presized, chosen)
        target = np.array([spec.classes.index(item.label) for item in chosen])
        numbers[split] = summary(probabilities, target, params.top_k)
        if spec.loss == "bce":
            numbers[split]["none_of_them"] = float((probabilities.max(1) < params.none_below).mean())
        if split == "test":
            with new_folder(report) as folder:
                _report(params, spec, presized, chosen, probabilities, target, folder)
    write_json(numbers, metrics)
    log.info("evaluate: accuracy %.4f on %d test images", numbers["test"]["accuracy"], numbers["test"]["images"])


def predict(
    params: Evaluate, model: torch.nn.Module, spec: BundleSpec, presized: Path, chosen: list[Item]
) -> np.ndarray:
    """Probabilities (images, classes) of the chosen items, in their order.

    With test-time augmentation (`tta` augmented views), fastai's weighted mean: PLAIN_WEIGHT of the plain view, the rest
    of the mean of the augmented ones. All views of an image are in the same batch, so that it is decoded once.
    """
    device = pick_device()
    block = data_block(presized, spec.classes, spec.geometry, spec.augment)
    view, store = View(block.item_tfms, block.batch_tfms), Store(presized, device, spec.geometry.max_side)
    model = model.to(device).to(memory_format=torch.channels_last)
    activation = loss_function(spec.loss).activation
    splits = [1] + [0] * params.tta  # fastai's number of a split decides whether a view is a random one
    at_once = max(1, params.batch_size // len(splits))
    set_seed(SEED)
    found = []
    with torch.inference_mode(), progress("evaluate (images)", len(chosen)) as advance:
        for pixels in store.batches(chosen[first : first + at_once] for first in range(0, len(chosen), at_once)):
            batch = torch.cat([view.finished(pixels, device, split) for split in splits])
            plain, *augmented = activation(model(batch).float()).chunk(len(splits))
            found.append(torch.lerp(torch.stack(augmented).mean(0), plain, PLAIN_WEIGHT) if augmented else plain)
            advance(len(plain))
    return torch.cat(found).double().cpu().numpy()


def _report(
    params: Evaluate,
    spec: BundleSpec,
    presized: Path,
    items: list[Item],
    probabilities: np.ndarray,
    target: np.ndarray,
    folder: Path,
) -> None:
    names = np.array(spec.classes)
    predicted = probabilities.argmax(1)
    table = pd.DataFrame(
        {
            "name": [item.name for item in items],
            "actual": names[target],
            "predicted": names[predicted],
            "probability": probabilities.max(1).round(6),
            "loss": -np.log(np.clip(probabilities[np.arange(len(target)), target], 1e-12, None)).round(6),
        }
    )
    write_csv(table, folder / "predictions.csv")
    scores = per_class(spec.classes, predicted, target)
    write_csv(scores, folder / "per_class.csv")
    write_csv(confused_pairs(table), folder / "confused.csv")
    _class_pictures(table, scores[scores["images"] > 0], folder)
    images = ShardSet(presized, PRESIZED_COLUMNS)
    worst = table.sort_values("loss", ascending=False, kind="stable").head(params.top_losses)
    rows = [
        (
            f"{short(row['actual'])}\nseen as {short(row['predicted'])}, {row['probability']:.0%}",
            images.read(items[number].shard, items[number].offset, items[number].size),
        )
        for number, row in zip(worst.index, worst.to_dict("records"), strict=True)
    ]
    sheet_picture(rows, folder / "top_losses.png")


def _class_pictures(predictions: pd.DataFrame, scores: pd.DataFrame, folder: Path) -> None:
    shown = scores.head(MAX_CLASSES)
    which = "by class" if len(shown) == len(scores) else f"of the worst {len(shown)} of {len(scores)} classes"
    counts = confusion(predictions, list(shown["class"]))
    confusion_picture(counts, f"Test split: confusion {which}", folder / "confusion.png")
    f1_picture(shown, scores["f1"].mean(), f"Test split: F1 {which}", folder / "f1.png")


if __name__ == "__main__":
    run(evaluate)
