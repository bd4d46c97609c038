"""Metrics, from probabilities (images, classes) and the true class indices `target` (images,)."""

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import f1_score, log_loss, precision_recall_fscore_support

DIGITS = 6
"""Decimals that metrics are rounded to."""
BINS = 15


def summary(probabilities: np.ndarray, target: np.ndarray, top_k: int) -> dict[str, float]:
    """Accuracy, error rate, top-k accuracy, macro F1, log loss and calibration error, and the number of images."""
    classes = np.arange(probabilities.shape[1])
    predicted = probabilities.argmax(1)
    accuracy = float((predicted == target).mean())
    k = min(top_k, len(classes))
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    # log loss needs probabilities that sum to 1 for each image: softmax's do, those of bce are scaled to it
    shares = probabilities / probabilities.sum(1, keepdims=True)
    numbers = {
        "accuracy": accuracy,
        "error_rate": 1 - accuracy,
        f"top_{k}_accuracy": float((best == target[:, None]).any(1).mean()),
        "macro_f1": float(f1_score(target, predicted, labels=np.unique(target), average="macro", zero_division=0)),
        "log_loss": float(log_loss(target, shares, labels=classes)),
        "calibration_error": calibration_error(probabilities, target),
    }
    return {name: round(value, DIGITS) for name, value in numbers.items()} | {"images": len(target)}


def calibration_error(probabilities: np.ndarray, target: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error (Guo et al., 2017): the mean of |confidence - accuracy| over the images' bins.

    The confidence of an image is its highest probability. 0 is perfect, 1 the worst.
    """
    return gap(*by_confidence(probabilities.max(1), probabilities.argmax(1) == target, bins))


def by_confidence(
    confidence: np.ndarray, right: np.ndarray, bins: int = BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images sorted into `bins` bins of equal width by their confidence: for each, its images, their sum of confidences
    and how many of them are `right`."""
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    images, sure, correct = (np.bincount(which, weights, bins) for weights in (None, confidence, right))
    return images, sure, correct


def gap(images: np.ndarray, sure: np.ndarray, right: np.ndarray) -> float:
    """The calibration error of what `by_confidence` gives."""
    return float(np.abs(sure - right).sum() / images.sum())


def per_class(classes: list[str], predicted: np.ndarray, target: np.ndarray) -> pd.DataFrame:
    """Precision, recall, F1 and number of images per class, sorted by F1 from the lowest."""
    values = precision_recall_fscore_support(target, predicted, labels=np.arange(len(classes)), zero_division=0)
    table = pd.DataFrame(dict(zip(["precision", "recall", "f1", "images"], values, strict=True)))
    table.insert(0, "class", classes)
    return table.round(DIGITS).sort_values(["f1", "class"], kind="stable")


def confused_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """How often each class (`actual`) is taken for another (`predicted`), sorted from the most frequent pair."""
    wrong = table[table["actual"] != table["predicted"]]
    pairs = wrong.groupby(["actual", "predicted"]).size().reset_index(name="times")
    return pairs.sort_values(["times", "actual", "predicted"], ascending=[False, True, True], kind="stable")


def confusion(table: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """The confusion matrix of `classes` as counts (rows `actual`, columns `predicted`), confused classes side by side.

    Rows and columns share the order of leaves of a hierarchical clustering with average linkage and optimal leaf order
    (Bar-Joseph et al., 2001). The distance of classes a and b is 1 - (share of a taken for b + share of b taken for a) / 2.
    """
    counts = pd.crosstab(table["actual"], table["predicted"]).reindex(index=classes, columns=classes, fill_value=0)
    if len(classes) < 2:
        return counts
    shares = counts.to_numpy() / counts.sum(axis=1).clip(lower=1).to_numpy()[:, None]
    distances = 1 - (shares + shares.T) / 2
    order = leaves_list(linkage(squareform(distances, checks=False), "average", optimal_ordering=True))
    return counts.iloc[order, order]
