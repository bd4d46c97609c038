"""What the numbers mean: from probabilities (images, classes) and true class numbers (images,) to metrics."""

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import f1_score, log_loss, precision_recall_fscore_support

DIGITS = 6
"""Metrics are rounded, so that a difference in them is a difference between models."""
BINS = 15


def summary(probabilities: np.ndarray, target: np.ndarray, top_k: int) -> dict[str, float]:
    """Accuracy, error rate, top-k accuracy, macro F1, log loss and calibration error, and the number of images."""
    classes = np.arange(probabilities.shape[1])
    predicted = probabilities.argmax(1)
    accuracy = float((predicted == target).mean())
    k = min(top_k, len(classes))
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    # one class is right, so the log loss takes bce's probabilities as shares of one, which softmax's are already
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
    """Expected calibration error (Guo et al., 2017): how far confidence is from accuracy, over `bins` equal bins."""
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == target
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = (
        abs(confidence[which == b].mean() - right[which == b].mean()) * (which == b).mean() for b in np.unique(which)
    )
    return float(sum(gaps))


def per_class(classes: list[str], predicted: np.ndarray, target: np.ndarray) -> pd.DataFrame:
    """Precision, recall, F1 and the number of images of each class, the worst first."""
    values = precision_recall_fscore_support(target, predicted, labels=np.arange(len(classes)), zero_division=0)
    table = pd.DataFrame(dict(zip(["precision", "recall", "f1", "images"], values, strict=True)))
    table.insert(0, "class", classes)
    return table.round(DIGITS).sort_values(["f1", "class"], kind="stable")


def confused_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """How often each class (`actual`) is taken for each other (`predicted`), the most frequent first."""
    wrong = table[table["actual"] != table["predicted"]]
    pairs = wrong.groupby(["actual", "predicted"]).size().reset_index(name="times")
    return pairs.sort_values(["times", "actual", "predicted"], ascending=[False, True, True], kind="stable")


def confusion(table: pd.DataFrame, classes: list[str]) -> pd.DataFrame:
    """The confusion matrix of `classes`: counts, rows `actual`, columns `predicted`, both in the same order.

    Classes that are confused stand side by side: leaves of a hierarchical clustering (average linkage) in optimal order
    (Bar-Joseph et al., 2001), where the distance of two classes is 1 less the mean of the shares of each that are taken
    for the other.
    """
    counts = pd.crosstab(table["actual"], table["predicted"]).reindex(index=classes, columns=classes, fill_value=0)
    if len(classes) < 2:
        return counts
    shares = counts.to_numpy() / counts.sum(axis=1).clip(lower=1).to_numpy()[:, None]
    distances = 1 - (shares + shares.T) / 2
    order = leaves_list(linkage(squareform(distances, checks=False), "average", optimal_ordering=True))
    return counts.iloc[order, order]
