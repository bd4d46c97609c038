"""Probabilities that are right as often as they say, and the one below which a photo shows none of the classes.

Logits are (images, classes), `target` the true class indices, (images,).
"""

import math

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, softmax

SPREAD = 0.5
"""Standard deviation of ln T before an image was seen: without it, a few images that are all right would make T nearly 0."""
RANGE = (-3.0, 3.0)
"""Of ln T."""


def fit_temperature(logits: np.ndarray, target: np.ndarray, loss: str) -> float:
    """The temperature T by which logits are divided (Guo et al., 2017).

    It minimises the sum of the images' losses at logits / T, plus (ln T)² / (2 SPREAD²): the most probable T if ln T is
    normally distributed around 0 beforehand.
    """
    logits = logits.astype(np.float64)
    wanted = np.arange(logits.shape[1]) == target[:, None]

    def cost(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        if loss == "bce":
            losses = -np.where(wanted, log_expit(scaled), log_expit(-scaled)).sum()
        else:
            losses = -log_softmax(scaled, axis=1)[wanted].sum()
        return float(losses + log_temperature**2 / (2 * SPREAD**2))

    found = minimize_scalar(cost, bounds=RANGE, method="bounded")
    return round(float(np.exp(found.x)), 6)


def probabilities_of(logits: np.ndarray, loss: str) -> np.ndarray:
    """Softmax over the last axis, or with `bce` a sigmoid of each logit; float64."""
    logits = logits.astype(np.float64)
    return expit(logits) if loss == "bce" else softmax(logits, axis=-1)


def threshold(probabilities: np.ndarray, error_rate: float) -> float:
    """The highest probability below which the best class of at most this share of the images lies."""
    found = float(np.quantile(probabilities.max(1), error_rate, method="lower"))
    return math.floor(found * 1e6) / 1e6  # not rounded up, or the image itself would be below
