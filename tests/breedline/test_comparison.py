"""Champion and challenger on the same images: intervals that are known or found by brute force, and the odd cases."""

import dataclasses
import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import xlogy
from scipy.stats import bootstrap, norm
from sklearn.metrics import balanced_accuracy_score, f1_score

from breedline import comparison
from breedline.comparison import (
    SKETCH,
    Comparison,
    Recall,
    compare,
    mcnemar,
    same_test_set,
    score_interval,
    sketch,
    spent,
)
from breedline.errors import BreedlineError
from breedline.params import Gate

GATE = Gate(
    metric="accuracy",
    margin=0.01,
    alpha=0.05,
    undecided="hold",
    class_images=5,
    max_calibration_rise=0.05,
    max_mb=100,
    max_slowdown=2,
)
METRICS = ("accuracy", "balanced_accuracy", "macro_f1")
CLASSES = ["cat", "dog", "elk"]
each_metric = pytest.mark.parametrize("metric", METRICS)


def sure_of(answers: np.ndarray, classes: int = len(CLASSES)) -> np.ndarray:
    return np.eye(classes)[answers] * 0.85 + 0.05


def compared(target: Any, champion: Any, challenger: Any, look: int = 1, **changes: Any) -> Comparison:
    gate = GATE.model_copy(update=changes)
    answers = (sure_of(np.asarray(each)) for each in (champion, challenger))
    return compare(gate, CLASSES, np.asarray(target), *answers, look=look)


def some_answers(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True classes of unequal frequency, and what two models take them for, each right in some 4 of 5 cases."""
    rng = np.random.default_rng(seed)
    target = rng.choice(3, images, p=[0.6, 0.3, 0.1])
    one, other = (np.where(rng.random(images) < 0.8, target, rng.integers(3, size=images)) for _ in range(2))
    return target, one, other


def test_the_score_interval_of_published_data() -> None:
    # airway hyper-responsiveness before and after transplantation, in Fagerland, Lydersen and Laake (2014)
    assert score_interval(1, 7, 21, 0.025) == pytest.approx((-0.517, -0.026), abs=5e-4)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 200), st.sampled_from([0.05, 0.025, 0.001]))
def test_the_ends_of_the_score_interval_solve_its_equation(fixed: int, broken: int, same: int, alpha: float) -> None:
    images = fixed + broken + same or 1
    for d in score_interval(fixed, broken, images, alpha):
        assert -1 <= d <= 1
        if abs(d) < 0.999:
            q = _most_probable(fixed, broken, images, d)
            score = (fixed - broken - images * d) / math.sqrt(images * (2 * q + d * (1 - d)))
            assert abs(score) == pytest.approx(norm.isf(alpha), rel=1e-3)


def _most_probable(fixed: int, broken: int, images: int, d: float) -> float:
    """The share of broken images if that of fixed ones is d more: where the likelihood is highest."""

    def unlikely(q: float) -> float:
        # a probability that rounding makes negative is 0
        shares = np.clip([q + d, q, 1 - 2 * q - d], 0, None)
        return float(-xlogy([fixed, broken, images - fixed - broken], shares).sum())

    bounds = (max(0.0, -d), (1 - d) / 2)
    return float(minimize_scalar(unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 99))
def test_who_is_called_champion_mirrors_the_score_interval(fixed: int, broken: int, same: int) -> None:
    images = fixed + broken + same
    low, high = score_interval(fixed, broken, images, 0.05)
    assert score_interval(broken, fixed, images, 0.05) == (-high, -low)
    assert low < (fixed - broken) / images < high


@pytest.mark.parametrize("images", [1, 10, 260, 10**6])
def test_equal_answers_have_an_interval_with_a_width(images: int) -> None:
    z = norm.isf(0.05)
    width = z**2 / (images + z**2)
    assert score_interval(0, 0, images, 0.05) == pytest.approx((-width, width))


@pytest.mark.parametrize(
    ("fixed", "broken", "two_sided", "one_sided"),
    [(0, 0, 1, 1), (1, 9, 22 / 1024, 11 / 1024), (9, 1, 22 / 1024, 1023 / 1024), (4, 4, 1, 163 / 256), (0, 1, 1, 0.5)],
)
def test_mcnemar_worked_by_hand(fixed: int, broken: int, two_sided: float, one_sided: float) -> None:
    assert mcnemar(fixed, broken) == pytest.approx(two_sided)
    assert mcnemar(fixed, broken, "greater") == pytest.approx(one_sided)


def test_a_comparison_worked_by_hand() -> None:
    target = [0] * 6 + [1] * 5 + [2]
    champion = [0] * 6 + [1] * 4 + [0] + [0]
    challenger = [0] * 4 + [1] * 2 + [1] * 5 + [0]
    found = compared(target, champion, challenger)
    assert (found.metric, found.images, found.fixed, found.broken, found.look) == ("accuracy", 12, 1, 2, 1)
    assert found.champion_value == pytest.approx(10 / 12, abs=1e-6)
    assert found.challenger_value == pytest.approx(9 / 12, abs=1e-6)
    assert found.difference == pytest.approx(-1 / 12, abs=1e-6)
    assert found.mcnemar_p == 1
    assert found.recalls == (Recall("cat", 6, 1, pytest.approx(4 / 6, abs=1e-6), 0.25), Recall("dog", 5, 0.8, 1, 1))
    assert found.champion_calibration_error == pytest.approx(0.9 - 10 / 12, abs=1e-6)
    assert found.challenger_calibration_error == pytest.approx(0.9 - 9 / 12, abs=1e-6)
    assert found.level == pytest.approx(1 - 0.1 * 6 / math.pi**2)
    assert found.alpha == pytest.approx(0.05 * 6 / math.pi**2)


def test_the_values_are_those_of_scikit_learn() -> None:
    target, one, other = some_answers(300)
    for metric, value in (("balanced_accuracy", balanced_accuracy_score), ("macro_f1", _f1)):
        found = compared(target, one, other, metric=metric)
        assert found.champion_value == pytest.approx(value(target, one), abs=1e-6)
        assert found.challenger_value == pytest.approx(value(target, other), abs=1e-6)


def _f1(target: np.ndarray, predicted: np.ndarray) -> float:
    return float(f1_score(target, predicted, labels=np.unique(target), average="macro", zero_division=0))


@each_metric
def test_the_bootstrap_is_that_of_scipy(metric: str) -> None:
    target, one, other = some_answers(120)

    def difference(target: np.ndarray, one: np.ndarray, other: np.ndarray) -> float:
        values = (_plainly(metric, target, predicted) for predicted in (other, one))
        return next(values) - next(values)

    theirs = bootstrap(
        (target, one, other),
        difference,
        paired=True,
        vectorized=False,
        n_resamples=2_000,
        confidence_level=0.9,
        rng=np.random.default_rng(1),
    ).confidence_interval
    answers, counts = np.unique(np.stack([target, one, other]), axis=1, return_counts=True)
    ours = comparison._bca(lambda rows: comparison._difference(metric, answers, rows), counts, 0.05)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.012)


def test_the_bootstrap_corrects_what_leans_to_one_side_as_scipy_does() -> None:
    values, counts = np.exp(np.linspace(0, 4, 30)), np.repeat([2, 1], 15)
    theirs = bootstrap(
        (np.repeat(values, counts),), np.var, confidence_level=0.9, n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval

    def variance(rows: np.ndarray) -> np.ndarray:
        return rows @ values**2 / rows.sum(1) - (rows @ values / rows.sum(1)) ** 2

    assert comparison._bca(variance, counts, 0.05) == pytest.approx((theirs.low, theirs.high), rel=0.04)


def test_the_bootstrap_corrects_what_is_biased_as_scipy_does() -> None:
    """The chance that two images are of one class, which is higher in resamples."""
    counts = np.array([40, 20, 10, 5, 3, 1, 1, 8, 9, 3])

    def alike(kinds: np.ndarray, axis: int) -> np.ndarray:
        return ((kinds[..., None] == np.arange(10)).mean(-2) ** 2).sum(-1)

    theirs = bootstrap(
        (np.repeat(np.arange(10), counts),),
        alike,
        confidence_level=0.9,
        n_resamples=5_000,
        batch=500,
        rng=np.random.default_rng(1),
    ).confidence_interval
    ours = comparison._bca(lambda rows: (rows**2).sum(1) / rows.sum(1) ** 2, counts, 0.05)
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.02)


def _plainly(metric: str, target: np.ndarray, predicted: np.ndarray) -> float:
    right = target == predicted
    if metric == "accuracy":
        return float(right.mean())
    of_each = [(target == label, predicted == label) for label in np.unique(target)]
    if metric == "balanced_accuracy":
        return float(np.mean([right[actual].mean() for actual, _ in of_each]))
    return float(np.mean([2 * (actual & taken).sum() / (actual.sum() + taken.sum()) for actual, taken in of_each]))


@each_metric
def test_the_interval_is_the_wider_one_at_each_end(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = some_answers(400)
    monkeypatch.setattr(comparison, "_bca", lambda *_: (math.nan, math.nan))
    score = compared(*answers, metric=metric)
    monkeypatch.setattr(comparison, "_bca", lambda *_: (-0.5, score.difference))
    assert compared(*answers, metric=metric).interval == (-0.5, score.interval[1])
    if metric == "accuracy":
        assert score.interval == pytest.approx(score_interval(score.fixed, score.broken, 400, score.alpha), abs=1e-6)
    else:  # the classes differ in their images, so that their mean is less certain than the accuracy
        low, high = score_interval(score.fixed, score.broken, 400, score.alpha)
        assert score.interval[1] - score.interval[0] > (high - low) * 1.1


@each_metric
@pytest.mark.parametrize("images", [1, 2, 40])
def test_models_that_answer_alike_differ_by_nothing_give_or_take(metric: str, images: int) -> None:
    target = np.arange(images) % 2
    found = compared(target, target, target, metric=metric)
    assert (found.difference, found.fixed, found.broken, found.mcnemar_p) == (0, 0, 0, 1)
    low, high = found.interval
    assert low == -high < -0.05
    assert found.images_to_decide is not None


@each_metric
@pytest.mark.parametrize(("champion", "challenger", "difference"), [(0, 1, 1), (1, 0, -1), (1, 1, 0)])
def test_one_image(metric: str, champion: int, challenger: int, difference: int) -> None:
    found = compared([1], [champion], [challenger], metric=metric)
    assert found.difference == difference
    low, high = found.interval
    assert -1 <= low <= difference <= high <= 1
    assert low < 0.01
    assert high > -0.01


@each_metric
@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_answers_have_an_interval_around_their_difference(metric: str, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=30))
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(comparison, "RESAMPLES", 99)
        found = compared(*zip(*rows, strict=True), metric=metric)
    low, high = found.interval
    assert -1 <= low <= found.difference <= high <= 1


@each_metric
def test_equal_answers_in_any_order_make_equal_comparisons(metric: str) -> None:
    answers = some_answers(200)
    shuffled = np.random.default_rng(3).permutation(200)
    assert compared(*answers, metric=metric) == compared(*(each[shuffled] for each in answers), metric=metric)


def test_what_is_in_memory_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = some_answers(100)
    monkeypatch.setattr(comparison, "RESAMPLES", 301)
    whole = compared(*answers, metric="macro_f1")
    monkeypatch.setattr(comparison, "CELLS", 100)
    assert compared(*answers, metric="macro_f1") == whole


def test_a_class_that_the_champion_does_not_know_is_wrong_there() -> None:
    target = np.array([0, 1, 2, 2, 2])
    champion = sure_of(np.array([0, 1, 0, 1, 0]))
    champion[:, 2] = 0
    champion[4] = 0  # nothing that it knows is probable
    found = compare(GATE, CLASSES, target, champion, sure_of(target))
    assert (found.champion_value, found.challenger_value, found.fixed, found.broken) == (0.4, 1, 3, 0)


def test_a_champion_that_knows_no_class_is_right_nowhere() -> None:
    found = compare(GATE, CLASSES, np.zeros(3, int), np.zeros((3, 3)), sure_of(np.zeros(3, int)))
    assert (found.champion_value, found.fixed) == (0, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["champion", "challenger"])
def test_probabilities_that_are_no_numbers_are_refused(which: str, value: float) -> None:
    answers = {name: sure_of(np.array([0, 1])) for name in ("champion", "challenger")}
    answers[which][1, 1] = value
    with pytest.raises(BreedlineError, match=f"the {which} gives probabilities that are no numbers: train it again"):
        compare(GATE, CLASSES, np.array([0, 1]), **answers)


def test_without_test_images_nothing_is_compared() -> None:
    with pytest.raises(BreedlineError, match=r"no images to compare models on: raise label\.test_pct"):
        compare(GATE, CLASSES, np.zeros(0, int), np.zeros((0, 3)), np.zeros((0, 3)))


def test_all_looks_together_spend_alpha() -> None:
    parts = [spent(0.05, look) for look in range(1, 100_000)]
    assert parts == sorted(parts, reverse=True)
    assert sum(parts) == pytest.approx(0.05, rel=1e-4)


def test_each_look_widens_the_interval() -> None:
    answers = some_answers(300)
    looks = [compared(*answers, look=look) for look in (1, 2, 5, 20)]
    for earlier, later in itertools.pairwise(looks):
        assert later.interval[0] < earlier.interval[0]
        assert later.interval[1] > earlier.interval[1]
        assert later.level > earlier.level


@pytest.mark.parametrize(("fixed", "broken", "times"), [(9, 9, 1), (20, 22, 1), (12, 10, 1), (0, 0, 0.1)])
def test_as_many_images_as_are_said_to_decide_do(fixed: int, broken: int, times: float) -> None:
    images = round(400 * times)
    answers = np.repeat([(0, 1, 0), (0, 0, 1), (0, 0, 0)], [fixed, broken, images - fixed - broken], axis=0).T
    found = compared(*answers)
    assert found.images_to_decide is not None
    assert found.images_to_decide > images
    more = compared(*np.repeat(answers, math.ceil(found.images_to_decide / images), axis=1))
    assert more.images_to_decide is None


def test_the_images_to_decide_are_those_of_the_normal_approximation() -> None:
    answers = np.repeat([(0, 1, 0), (0, 0, 1), (0, 0, 0)], [40, 40, 920], axis=0).T
    found = compared(*answers)
    needed = ((norm.isf(found.alpha) + norm.ppf(0.8)) / GATE.margin) ** 2 * 80 / 1000
    assert found.images_to_decide == pytest.approx(needed, rel=0.08)


@pytest.mark.parametrize(("fixed", "broken"), [(50, 0), (0, 50)])
def test_images_that_decide_need_no_more(fixed: int, broken: int) -> None:
    answers = np.repeat([(0, 1, 0), (0, 0, 1), (0, 0, 0)], [fixed, broken, 200], axis=0).T
    assert compared(*answers).images_to_decide is None


def test_a_comparison_is_plain_numbers() -> None:
    found = dataclasses.asdict(compared(*some_answers(50)))
    assert {type(value) for value in found.values()} <= {str, int, float, tuple, type(None)}
    assert {type(value) for value in found["interval"]} == {float}


def contents(first: int, last: int) -> list[str]:
    return [f"{number:064x} cat" for number in range(first, last)]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (contents(0, 1000), contents(0, 1000), True),
        (contents(0, 1000), contents(0, 1001), True),
        (contents(0, 1000), contents(100, 1100), True),
        (contents(0, 1000), contents(450, 1450), False),
        (contents(0, 1000), contents(1000, 2000), False),
        (contents(0, 1000), contents(0, 4000), False),
        (contents(0, 3), contents(0, 2), True),
        (contents(0, 4), contents(0, 1), False),
        (contents(0, 2), [], False),
        ([], [], False),
    ],
)
def test_a_test_set_is_the_same_one_if_most_of_its_images_are(one: list[str], other: list[str], same: bool) -> None:
    assert same_test_set(sketch(one), sketch(other)) is same
    assert same_test_set(sketch(other), sketch(one)) is same


def test_a_sketch_is_short_and_knows_no_order_but_labels() -> None:
    found = sketch(contents(0, 500))
    assert len(found) == SKETCH
    assert {len(each) for each in found} == {8}
    assert sketch(reversed(contents(0, 500))) == found == sketch(contents(0, 500) * 2)
    assert not set(sketch(each.replace("cat", "dog") for each in contents(0, 500))) & set(found)
