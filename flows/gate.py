"""The gate: decides whether the newly trained model (challenger) may replace the published one (champion)."""

from dataclasses import dataclass
from typing import Literal

from breedline.comparison import Comparison
from breedline.params import Gate

Verdict = Literal["promote", "hold", "undecided"]


@dataclass(frozen=True)
class Decision:
    """A verdict with its reasons, each a line, and whether the challenger is to be published."""

    verdict: Verdict
    reasons: list[str]
    publish: bool

    def __str__(self) -> str:
        return f"{self.verdict}: {'; '.join(self.reasons)}"


def decide(
    settings: Gate, comparison: Comparison | None, *, megabytes: float, slowdown: float | None = None
) -> Decision:
    """Promote a challenger that is proved to be as good, up to the margin; hold one that is proved worse, or over a limit.

    Args:
        comparison: None if there is no champion yet.
        megabytes: the challenger's bundle.
        slowdown: how many times the champion's seconds for an image the challenger takes, measured side by side; None if unknown.
    """
    floors = [*_costs(settings, megabytes, slowdown), *(_losses(settings, comparison) if comparison else [])]
    if comparison is None:
        return _decision(settings, "hold" if floors else "promote", ["there is no champion yet", *floors])
    low, high = comparison.interval
    summary = (
        f"{comparison.metric} {comparison.champion_value:.4f} -> {comparison.challenger_value:.4f} "
        f"({comparison.difference:+.4f}, {low:+.4f} to {high:+.4f} at {comparison.level:.1%})"
    )
    if high < 0:
        return _decision(settings, "hold", [f"{summary}: worse", *floors])
    if floors:
        return _decision(settings, "hold", [summary, *floors])
    if low > -settings.margin:
        return _decision(settings, "promote", [f"{summary}: not worse by the margin of {settings.margin:g}"])
    few = f"{comparison.images:,} test images do not decide, about {comparison.images_to_decide:,} would"
    return _decision(settings, "undecided", [summary, few])


def _decision(settings: Gate, verdict: Verdict, reasons: list[str]) -> Decision:
    done = settings.undecided if verdict == "undecided" else verdict
    return Decision(verdict, reasons, done == "promote")


def _costs(settings: Gate, megabytes: float, slowdown: float | None) -> list[str]:
    lines = []
    if megabytes > settings.max_mb:
        lines.append(f"the bundle has {megabytes:.1f} MB, more than gate.max_mb: {settings.max_mb:g}")
    if slowdown is not None and slowdown > settings.max_slowdown:
        lines.append(
            f"an image takes {slowdown:.2f} times as long, more than gate.max_slowdown: {settings.max_slowdown:g}"
        )
    return lines


def _losses(settings: Gate, comparison: Comparison) -> list[str]:
    """What the metric may hide: classes that are recognised less often, and probabilities that promise too much.

    A class counts by Bonferroni: with k classes tested, its p-value has to be 1 / k of what is allowed.
    """
    lines = [
        f"recall of {recall.label} {recall.champion:.4f} -> {recall.challenger:.4f} on {recall.images} images (p = {recall.p:.2g})"
        for recall in comparison.recalls
        if recall.p * len(comparison.recalls) <= comparison.alpha
    ]
    before, after = comparison.champion_calibration_error, comparison.challenger_calibration_error
    if after - before > settings.max_calibration_rise:
        lines.append(
            f"calibration error {before:.4f} -> {after:.4f}, a rise beyond gate.max_calibration_rise: {settings.max_calibration_rise:g}"
        )
    return lines
