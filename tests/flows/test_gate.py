"""The gate: what is published, what is held, and what a misspelled metric is told."""

import math

import pytest

from breedline.errors import BreedlineError
from breedline.params import Gate
from flows.gate import decide

ACCURACY = "metrics/evaluate.json:test.accuracy"
LOSS = "metrics/train.json:valid.loss"
GATE = Gate(metric="test.accuracy", tolerance=0.05)


@pytest.mark.parametrize(
    ("champion", "challenger", "publish", "why"),
    [
        (0.8, 0.9, True, "test.accuracy 0.8 -> 0.9 (+0.1)"),
        (0.8, 0.8, True, "test.accuracy 0.8 -> 0.8 (+0)"),
        (0.8, 0.76, True, "test.accuracy 0.8 -> 0.76 (-0.04), within the tolerance of 0.05"),
        (0.75, 0.6875, False, "test.accuracy 0.75 -> 0.6875 (-0.0625), beyond the tolerance of 0.05"),
        (None, 0.1, True, "test.accuracy 0.1, and there is no champion yet"),
        (0.8, None, False, "the challenger has no test.accuracy"),
        (None, None, False, "the challenger has no test.accuracy"),
        (0.8, math.nan, False, "the challenger has no test.accuracy"),
        (None, math.nan, False, "the challenger has no test.accuracy"),
        (math.nan, 0.1, True, "test.accuracy 0.1, and there is no champion yet"),
    ],
)
def test_the_challenger_may_be_worse_by_the_tolerance(
    champion: float | None, challenger: float | None, publish: bool, why: str
) -> None:
    assert decide(GATE, {ACCURACY: (champion, challenger), LOSS: (1.0, 2.0)}) == (publish, why)


@pytest.mark.parametrize(("tolerance", "publish"), [(0.25, True), (0.2499, False)])
def test_exactly_the_tolerance_is_within(tolerance: float, publish: bool) -> None:
    gate = GATE.model_copy(update={"tolerance": tolerance})
    assert decide(gate, {ACCURACY: (0.75, 0.5)}).publish == publish


def test_a_metric_may_be_named_with_its_file() -> None:
    metrics = {ACCURACY: (0.9, 0.5), "metrics/other.json:test.accuracy": (0.5, 0.9)}
    for name, publish in zip(metrics, [False, True], strict=True):
        assert decide(GATE.model_copy(update={"metric": name}), metrics).publish == publish


@pytest.mark.parametrize("wrong", ["accuracy", "evaluate.json:test.accuracy", "test", "metrics/evaluate.json"])
def test_an_unknown_metric_is_told_what_there_is(wrong: str) -> None:
    with pytest.raises(BreedlineError) as error:
        decide(GATE.model_copy(update={"metric": wrong}), {ACCURACY: (0.5, 0.6), LOSS: (1.0, 2.0)})
    assert str(error.value) == f"gate.metric in params.yaml: {wrong} is none of {ACCURACY}, {LOSS}"


def test_an_ambiguous_metric_is_told_to_name_its_file() -> None:
    other = "metrics/other.json:test.accuracy"
    with pytest.raises(BreedlineError) as error:
        decide(GATE, {ACCURACY: (0.5, 0.6), other: (0.5, 0.6)})
    assert str(error.value) == (
        f"gate.metric in params.yaml: test.accuracy is in {ACCURACY} and {other}: write which, as file:key"
    )


def test_no_metrics_at_all() -> None:
    with pytest.raises(BreedlineError, match="is none of the metrics, of which there are none"):
        decide(GATE, {})


def test_a_decision_is_a_line() -> None:
    assert str(decide(GATE, {ACCURACY: (0.5, 0.25)})).startswith("hold: test.accuracy 0.5 -> 0.25")
    assert str(decide(GATE, {ACCURACY: (0.5, 0.75)})) == "publish: test.accuracy 0.5 -> 0.75 (+0.25)"
