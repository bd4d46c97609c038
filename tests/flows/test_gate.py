"""The gate: what is promoted, what is held, what the test images do not decide, and the reasons that it gives."""

import dataclasses
from typing import Any

import pytest

from breedline.comparison import Comparison, Recall
from breedline.params import Gate
from flows.gate import decide

GATE = Gate(
    metric="accuracy",
    margin=0.01,
    alpha=0.05,
    undecided="hold",
    class_images=30,
    max_calibration_rise=0.05,
    max_mb=100,
    max_slowdown=2,
)
COMPARISON = Comparison(
    metric="accuracy",
    images=1478,
    champion_value=0.95,
    challenger_value=0.955,
    difference=0.005,
    interval=(-0.004, 0.014),
    level=0.94,
    fixed=20,
    broken=13,
    mcnemar_p=0.296,
    recalls=(),
    champion_calibration_error=0.02,
    challenger_calibration_error=0.02,
    images_to_decide=None,
    look=1,
)
SUMMARY = "accuracy 0.9500 -> 0.9550 (+0.0050, -0.0040 to +0.0140 at 94.0%)"


def decided(*, undecided: str = "hold", megabytes: float = 10, slowdown: float | None = None, **changes: Any) -> Any:
    gate = GATE.model_copy(update={"undecided": undecided})
    return decide(gate, dataclasses.replace(COMPARISON, **changes), megabytes=megabytes, slowdown=slowdown)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((-0.004, 0.014), "promote"),
        ((0.001, 0.009), "promote"),
        ((-0.0099, 0.02), "promote"),
        ((-0.01, 0.02), "undecided"),
        ((-0.03, 0.0), "undecided"),
        ((-0.03, -0.001), "hold"),
        ((-0.009, -0.001), "hold"),
    ],
)
@pytest.mark.parametrize("undecided", ["hold", "promote"])
def test_the_interval_decides(interval: tuple[float, float], verdict: str, undecided: str) -> None:
    decision = decided(interval=interval, images_to_decide=9999, undecided=undecided)
    assert decision.verdict == verdict
    assert decision.publish == (verdict == "promote" or (verdict, undecided) == ("undecided", "promote"))


def test_a_promotion_is_a_line() -> None:
    assert str(decided()) == f"promote: {SUMMARY}: not worse by the margin of 0.01"


def test_what_is_worse_is_told_so_even_within_the_margin() -> None:
    decision = decided(interval=(-0.009, -0.001))
    assert decision.reasons[0].endswith("(+0.0050, -0.0090 to -0.0010 at 94.0%): worse")


def test_what_is_undecided_says_how_many_images_would_decide() -> None:
    decision = decided(interval=(-0.02, 0.02), images_to_decide=5012)
    assert decision.reasons[1] == "1,478 test images do not decide, about 5,012 would"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"megabytes": 100.1}, "the bundle has 100.1 MB, more than gate.max_mb: 100"),
        ({"slowdown": 2.5}, "an image takes 2.50 times as long, more than gate.max_slowdown: 2"),
        (
            {"challenger_calibration_error": 0.08},
            "calibration error 0.0200 -> 0.0800, a rise beyond gate.max_calibration_rise: 0.05",
        ),
        (
            {"recalls": (Recall("cat", 40, 0.95, 0.5, 0.0001), Recall("dog", 40, 0.9, 0.8, 0.02))},
            "recall of cat 0.9500 -> 0.5000 on 40 images (p = 0.0001)",
        ),
    ],
)
@pytest.mark.parametrize("interval", [(0.001, 0.01), (-0.02, 0.02), (-0.02, -0.01)])
def test_a_broken_floor_holds_whatever_the_interval(
    changes: dict[str, Any], reason: str, interval: tuple[float, float]
) -> None:
    decision = decided(interval=interval, undecided="promote", **changes)
    assert (decision.verdict, decision.publish) == ("hold", False)
    assert decision.reasons[1:] == [reason]


@pytest.mark.parametrize(
    "changes",
    [
        {"megabytes": 100},
        {"slowdown": 2},
        {"challenger_calibration_error": 0.06},
        {"champion_calibration_error": 0.5},
        {"recalls": (Recall("cat", 40, 0.95, 0.85, 0.02), Recall("dog", 40, 0.9, 0.9, 1))},
    ],
)
def test_floors_that_hold(changes: dict[str, Any]) -> None:
    assert decided(**changes).verdict == "promote"


def test_a_fall_of_one_of_many_classes_may_be_chance() -> None:
    fallen = Recall("cat", 40, 0.95, 0.8, 0.02)
    assert decided(recalls=(fallen,)).verdict == "hold"
    others = [Recall(str(number), 40, 0.9, 0.9, 1) for number in range(36)]
    assert decided(recalls=(fallen, *others)).verdict == "promote"


def test_all_reasons_are_told() -> None:
    decision = decided(megabytes=500, slowdown=3, challenger_calibration_error=0.9)
    assert len(decision.reasons) == 4
    assert str(decision).startswith(f"hold: {SUMMARY}; the bundle has 500.0 MB")


@pytest.mark.parametrize(("megabytes", "verdict"), [(10, "promote"), (101, "hold")])
def test_the_first_model_has_only_to_be_small_enough(megabytes: float, verdict: str) -> None:
    decision = decide(GATE, None, megabytes=megabytes)
    assert (decision.verdict, decision.publish) == (verdict, verdict == "promote")
    assert decision.reasons[0] == "there is no champion yet"
