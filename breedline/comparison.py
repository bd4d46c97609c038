"""Two models, the champion and its challenger, compared on the test images that both have answered.

What is compared are pairs: only images that one of the two gets right and the other wrong tell them apart. Probabilities
are (images, classes), `target` the true class indices, (images,).
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.sparse import csr_array
from scipy.special import ndtr, ndtri
from scipy.stats import binomtest

from breedline.errors import BreedlineError
from breedline.metrics import DIGITS, calibration_error
from breedline.params import Gate

POWER = 0.8
"""Chance that the test images which are said to decide do so."""
RESAMPLES = 9_999
SEED = 0
"""Equal answers get an equal interval."""
CELLS = 2**22
"""Counts of resamples that are in memory at a time."""
SKETCH = 128
HEX_DIGITS = 8
SAME = 0.5
"""Share of two test sets that is in both, from which on they count as one and the same."""


class Recall(NamedTuple):
    """How many of a class's test images each model recognises, and the p-value of the fall."""

    label: str
    images: int
    champion: float
    challenger: float
    p: float
    """Of an exact McNemar test against the champion being better: one-sided."""


@dataclass(frozen=True)
class Comparison:
    """What the answers of both models to the same images say about the difference, challenger minus champion."""

    metric: str
    images: int
    champion_value: float
    challenger_value: float
    difference: float
    interval: tuple[float, float]
    level: float
    """Of the interval; each of its ends is wrong in (1 - level) / 2 of all cases."""
    fixed: int
    """Images that the champion gets wrong and the challenger right."""
    broken: int
    """Images that the champion gets right and the challenger wrong."""
    mcnemar_p: float
    """Of the exact McNemar test, two-sided."""
    recalls: tuple[Recall, ...]
    """Of the classes with enough images."""
    champion_calibration_error: float
    challenger_calibration_error: float
    images_to_decide: int | None
    """About how many test images would decide; None if these do."""
    look: int
    """1 for the first comparison on this test set."""

    @property
    def alpha(self) -> float:
        """How often each end of the interval may be wrong."""
        return (1 - self.level) / 2


def compare(
    settings: Gate,
    classes: list[str],
    target: np.ndarray,
    champion: np.ndarray,
    challenger: np.ndarray,
    *,
    look: int = 1,
) -> Comparison:
    """Compare the probabilities that two models give the same test images.

    Args:
        classes: the challenger's, to which the columns belong; a class that the champion does not know has probability 0.
        look: how many comparisons on this test set there are with this one.

    Raises:
        BreedlineError: there are no test images, or a probability is no number.
    """
    if not len(target):
        raise BreedlineError("the test split has no images to compare models on: raise label.test_pct in params.yaml")
    for name, probabilities in (("champion", champion), ("challenger", challenger)):
        if not np.isfinite(probabilities).all():
            raise BreedlineError(
                f"the {name} gives probabilities that are no numbers: train it again, with train.precision: fp32"
            )
    before, after = _predicted(champion), _predicted(challenger)
    fixed = (before != target) & (after == target)
    broken = (before == target) & (after != target)
    once = np.ones((1, len(target)), int)
    values = [_value(settings.metric, target, predicted, once).item() for predicted in (before, after)]
    alpha = spent(settings.alpha, look)
    difference = values[1] - values[0]
    low, high = _interval(settings.metric, target, before, after, difference, alpha)
    return Comparison(
        metric=settings.metric,
        images=len(target),
        champion_value=round(values[0], DIGITS),
        challenger_value=round(values[1], DIGITS),
        difference=round(difference, DIGITS),
        interval=(round(low, DIGITS), round(high, DIGITS)),
        level=1 - 2 * alpha,
        fixed=int(fixed.sum()),
        broken=int(broken.sum()),
        mcnemar_p=mcnemar(int(fixed.sum()), int(broken.sum())),
        recalls=tuple(_recalls(settings.class_images, classes, target, fixed, broken, before)),
        champion_calibration_error=round(calibration_error(champion, target), DIGITS),
        challenger_calibration_error=round(calibration_error(challenger, target), DIGITS),
        images_to_decide=_to_decide(len(target), difference, low, high, settings.margin, alpha),
        look=look,
    )


def spent(alpha: float, look: int) -> float:
    """The part of `alpha` for this look: alpha * 6 / (pi² look²), of which all looks together have alpha."""
    return alpha * 6 / (math.pi * look) ** 2


@lru_cache
def mcnemar(fixed: int, broken: int, alternative: str = "two-sided") -> float:
    """p-value of the exact McNemar test (1947): of the images that only one model gets right, each has half.

    `greater` asks if the champion is better, so that more is broken than chance explains.
    """
    if not fixed + broken:
        return 1.0
    return float(binomtest(broken, fixed + broken, alternative=alternative).pvalue)


def score_interval(fixed: int, broken: int, images: int, alpha: float) -> tuple[float, float]:
    """Tango's interval (Statistics in Medicine 17, 1998) for the difference of two paired proportions.

    It holds each difference d, from -1 to 1, for which |fixed - broken - n d| <= z sqrt(n (2 q + d (1 - d))): n images,
    q the most probable share of broken images if d is the true difference, z the quantile of 1 - alpha. It keeps its
    level with few images, and has a width even if no answer differs: ± z² / (n + z²).
    """
    z = -float(ndtri(alpha))
    return _score_low(fixed, broken, images, z), -_score_low(broken, fixed, images, z)


def _score_low(fixed: int, broken: int, images: int, z: float) -> float:
    def over(d: float) -> float:
        b, c = (2 * images - fixed + broken) * d - fixed - broken, -broken * d * (1 - d)
        q = (math.sqrt(max(b * b - 8 * images * c, 0)) - b) / (4 * images)
        return fixed - broken - images * d - z * math.sqrt(max(images * (2 * q + d * (1 - d)), 0))

    # the end is below the difference found, where without differing answers there is a second root
    found = (fixed - broken) / images - 1e-9
    return -1.0 if found <= -1 else float(brentq(over, -1.0, found))


def sketch(contents: Iterable[str]) -> list[str]:
    """A test set in few numbers: the lowest of the keyed hashes of its images, each given as `sha256 label`."""
    hashes = {
        hashlib.blake2b(each.encode(), digest_size=HEX_DIGITS // 2, key=b"test set").hexdigest() for each in contents
    }
    return sorted(hashes)[:SKETCH]


def same_test_set(one: list[str], other: list[str]) -> bool:
    """Whether two sketches are of one test set, give or take: the share of their images in both is at least SAME.

    The share is estimated from the lowest hashes of the union (Broder, 1997), so that an image more, or a corrected label,
    does not make a test set a new one.
    """
    lowest = sorted({*one, *other})[:SKETCH]
    return bool(lowest) and len({*lowest} & {*one} & {*other}) >= SAME * len(lowest)


def _predicted(probabilities: np.ndarray) -> np.ndarray:
    """The best class; -1, which is wrong, for an image whose classes the model all lacks."""
    return np.where(probabilities.max(1) > 0, probabilities.argmax(1), -1)


def _value(metric: str, target: np.ndarray, predicted: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The metric of each row of `counts` (rows, answers): how often each answer, a pair of target and predicted, occurs.

    Classes without an image in a row are not part of its mean.
    """
    right = target == predicted
    if metric == "accuracy":
        return counts @ right / counts.sum(1)
    of_class = target[:, None] == np.unique(target)
    images, hits = (counts @ csr_array(which.astype(float)) for which in (of_class, of_class & right[:, None]))
    total = images
    if metric == "macro_f1":
        total = (images + counts @ csr_array((predicted[:, None] == np.unique(target)).astype(float))) / 2
    there = images > 0
    return np.divide(hits, total, out=np.zeros_like(total), where=there).sum(1) / there.sum(1)


def _interval(
    metric: str, target: np.ndarray, before: np.ndarray, after: np.ndarray, difference: float, alpha: float
) -> tuple[float, float]:
    """The wider, at each end, of the bootstrap's interval and the score interval of the accuracy.

    The bootstrap knows any metric, but of few differing answers it makes far too little: of none, an interval without a
    width. The score interval is right there. For a mean over classes it is widened by the root of Kish's design effect
    (1965), n sum(w²) with the weights w that images have in the mean: more than 1 where classes differ in their images.
    """
    images = len(target)
    fixed, broken = (before != target) & (after == target), (before == target) & (after != target)
    accuracy = (fixed.sum() - broken.sum()) / images
    stretch = 1.0
    if metric == "accuracy":  # only who is wrong alone matters, so that there are at most three different answers
        target, before, after = np.zeros(images, int), fixed, broken
    else:
        _, per_class = np.unique(target, return_counts=True)
        stretch = math.sqrt(images * (1 / per_class).sum()) / len(per_class)
    ends = score_interval(int(fixed.sum()), int(broken.sum()), images, alpha)
    low, high = (difference + stretch * (end - accuracy) for end in ends)
    answers, counts = np.unique(np.stack([target, before, after]), axis=1, return_counts=True)
    resampled = _bca(partial(_difference, metric, answers), counts, alpha)
    return max(-1.0, float(np.fmin(low, resampled[0]))), min(1.0, float(np.fmax(high, resampled[1])))


def _difference(metric: str, answers: np.ndarray, counts: np.ndarray) -> np.ndarray:
    target, before, after = answers
    # equal counts give equal numbers, whatever the order of the sums
    return (_value(metric, target, after, counts) - _value(metric, target, before, counts)).round(12)


def _bca(statistic: Callable[[np.ndarray], np.ndarray], counts: np.ndarray, alpha: float) -> tuple[float, float]:
    """The bias-corrected and accelerated bootstrap (Efron, 1987); NaN if no resample differs from another.

    The same as scipy.stats.bootstrap's BCa of the images, but drawn as counts of different answers, of which there are
    few: a resample of n images is a multinomial draw, and leaving out an image is one for each answer instead of each
    image, where scipy needs memory and time for n².
    """
    images, rows = counts.sum(), max(1, CELLS // len(counts))
    rng = np.random.default_rng(SEED)
    drawn = [
        statistic(rng.multinomial(images, counts / images, min(rows, RESAMPLES - start)))
        for start in range(0, RESAMPLES, rows)
    ]
    values = np.concatenate(drawn)
    if np.ptp(values) == 0:
        return math.nan, math.nan
    found = statistic(counts[None])[0]
    below = ((values < found).mean() + (values <= found).mean()) / 2
    bias = ndtri(np.clip(below, 0.5 / RESAMPLES, 1 - 0.5 / RESAMPLES))
    left_out = np.concatenate(
        [
            statistic(counts - np.eye(min(rows, len(counts) - start), len(counts), start, dtype=int))
            for start in range(0, len(counts), rows)
        ]
    )
    pull = np.average(left_out, weights=counts) - left_out
    spread = (counts * pull**2).sum()
    acceleration = (counts * pull**3).sum() / (6 * spread**1.5) if spread else 0.0
    z = bias + ndtri([alpha, 1 - alpha])
    low, high = np.quantile(values, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def _recalls(
    least: int, classes: list[str], target: np.ndarray, fixed: np.ndarray, broken: np.ndarray, before: np.ndarray
) -> Iterable[Recall]:
    for index, label in enumerate(classes):
        of_class = target == index
        if (images := int(of_class.sum())) < least:
            continue
        gained, lost = int(fixed[of_class].sum()), int(broken[of_class].sum())
        champion = float((before[of_class] == index).mean())
        challenger = champion + (gained - lost) / images
        p = mcnemar(gained, lost, "greater")
        yield Recall(label, images, round(champion, DIGITS), round(challenger, DIGITS), p)


def _to_decide(images: int, difference: float, low: float, high: float, margin: float, alpha: float) -> int | None:
    """About how many images it takes to exclude, with POWER, a loss of the margin or else a gain.

    The interval's half-width is z_alpha SE, and SE falls with the root of n. Wanted is (z_alpha + z_power) SE <= distance,
    where the distance is that of the difference found to what would be excluded; at most the margin, as a gain may be luck.
    """
    if low > -margin or high < 0:
        return None
    error = max(high - difference, difference - low) / -ndtri(alpha)
    distance = min(margin, max(difference + margin, -difference))
    return math.ceil(images * (error * (ndtri(POWER) - ndtri(alpha)) / distance) ** 2)
