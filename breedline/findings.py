"""What evaluate has found, as numbers, tables and pictures.

Probabilities are (images, classes), `target` the true class indices, (images,).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from breedline.calibration import fit_temperature, probabilities_of, threshold
from breedline.items import Item
from breedline.metrics import DIGITS, confused_pairs, confusion, per_class, summary
from breedline.params import Evaluate
from breedline.pictures import MAX_CLASSES, confusion_picture, f1_picture, sheet_picture, short
from breedline.shards import ShardSet
from breedline.tables import write_csv
from breedline.trained import TrainedSpec

PLAIN_WEIGHT = 0.25
"""Weight of the central view in test-time augmentation; the mean of the augmented ones has the rest, as in fastai."""


@dataclass(frozen=True)
class Calibrated:
    """Probabilities before and after calibration, (images, classes), and what it has found."""

    before: np.ndarray
    probabilities: np.ndarray
    temperature: float
    none_below: float
    """An image whose highest probability is lower is none of the classes."""


def calibrated(
    params: Evaluate, spec: TrainedSpec, logits: np.ndarray, target: np.ndarray, valid: np.ndarray, *, adjustable: bool
) -> Calibrated:
    """Fit a temperature and a threshold to the images that are `valid`, and apply them to all.

    Args:
        logits: (views, images, classes), the central view first.
        valid: (images,) of truth values; with none that is true, the temperature is 1 and the threshold 0.
        adjustable: whether the model's logits can be divided; if not, the temperature is 1.
    """
    fits = adjustable and valid.any()
    temperature = fit_temperature(logits[0, valid], target[valid], spec.loss) if fits else 1.0
    before, after = (_mean_of_views(probabilities_of(scaled, spec.loss)) for scaled in (logits, logits / temperature))
    none_below = threshold(after[valid], params.none_error) if valid.any() else 0.0
    return Calibrated(before, after, temperature, none_below)


def _mean_of_views(probabilities: np.ndarray) -> np.ndarray:
    plain, *augmented = probabilities
    return PLAIN_WEIGHT * plain + (1 - PLAIN_WEIGHT) * np.mean(augmented, axis=0) if augmented else plain


def numbers_of(params: Evaluate, found: Calibrated, target: np.ndarray, split: np.ndarray) -> dict[str, float]:
    """The metrics of a split, what they were before calibration, and the share of images taken for none of the classes."""
    numbers = summary(found.probabilities[split], target[split], params.top_k)
    before = summary(found.before[split], target[split], params.top_k)
    changed = {f"{name}_before": before[name] for name in ("log_loss", "calibration_error")}
    none = round(float((found.probabilities[split].max(1) < found.none_below).mean()), DIGITS)
    return {**numbers, **changed, "none_of_them": none}


def write_report(
    params: Evaluate,
    spec: TrainedSpec,
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
