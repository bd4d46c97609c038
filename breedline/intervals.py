"""How far a number may be from what more images would give."""

import warnings
from collections.abc import Callable

import numpy as np
from scipy.stats import DegenerateDataWarning, binomtest, bootstrap

LEVEL = 0.95
RESAMPLES = 2000
JACKKNIFED = 10_000
"""Up to so many images the interval is corrected by leaving out each of them once; with more it hardly changes."""
AT_ONCE = 4_000_000
"""Images of all resamples that are in memory together, at most."""
SEED = 0
Interval = tuple[float, float]


def wilson(right: int, images: int) -> Interval | None:
    """Wilson's interval of the share `right / images`; None where there are no images."""
    if not images:
        return None
    low, high = binomtest(int(right), int(images)).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def bootstrapped(statistic: Callable[..., float], *columns: np.ndarray) -> Interval | None:
    """The bootstrap interval (BCa; Efron, 1987) of `statistic(*columns)`, whose rows are images; always the same one.

    None where resamples do not differ, such as a mean of losses that are all zero: they say nothing of other images.
    """
    images = len(columns[0])
    if images < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # of the same, from numpy
        found = bootstrap(
            columns,
            statistic,
            paired=True,
            vectorized=False,
            n_resamples=RESAMPLES,
            batch=max(1, AT_ONCE // images),
            confidence_level=LEVEL,
            method="BCa" if images <= JACKKNIFED else "percentile",
            rng=np.random.default_rng(SEED),
        )
    low, high = map(float, found.confidence_interval)
    return (low, high) if np.isfinite([low, high]).all() and low < high else None
