"""What evaluate has found, as numbers, tables and pictures.

Probabilities are (images, classes), `target` the true class indices, (images,).
"""

from pathlib import Path

import numpy as np
import pandas as pd

from breedline.bundle import BundleSpec
from breedline.items import Item
from breedline.metrics import confused_pairs, confusion, per_class, summary
from breedline.params import Evaluate
from breedline.pictures import MAX_CLASSES, confusion_picture, f1_picture, sheet_picture, short
from breedline.shards import ShardSet
from breedline.tables import write_csv


def numbers_of(params: Evaluate, spec: BundleSpec, probabilities: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """The metrics of a split, and with `loss: bce` the share of images that are none of the classes."""
    numbers = summary(probabilities, target, params.top_k)
    if spec.loss == "bce":
        numbers["none_of_them"] = float((probabilities.max(1) < params.none_below).mean())
    return numbers


def write_report(
    params: Evaluate,
    spec: BundleSpec,
    images: ShardSet,
    items: list[Item],
    probabilities: np.ndarray,
    target: np.ndarray,
    folder: Path,
) -> None:
    """Write predictions, scores per class, confused pairs and pictures of a split into `folder`."""
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
