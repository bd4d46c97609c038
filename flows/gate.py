"""The gate: decides whether the newly trained model (challenger) may replace the published one (champion)."""

import math
from typing import NamedTuple

from breedline.errors import BreedlineError
from breedline.params import Gate


class Decision(NamedTuple):
    """Whether to publish, and the reason in one line."""

    publish: bool
    why: str

    def __str__(self) -> str:
        return f"{'publish' if self.publish else 'hold'}: {self.why}"


def decide(settings: Gate, metrics: dict[str, tuple[float | None, float | None]]) -> Decision:
    """Compare one metric of the champion and the challenger; higher is better, and NaN counts as missing.

    Args:
        metrics: {"file:key": (champion's value, challenger's value)}.

    Raises:
        BreedlineError: the metric is in no file, or in several.
    """
    found = [name for name in metrics if settings.metric in (name, name.partition(":")[2])]
    if len(found) != 1:
        what = (
            f"is in {' and '.join(found)}: write which, as file:key"
            if found
            else f"is none of {', '.join(metrics) or 'the metrics, of which there are none'}"
        )
        raise BreedlineError(f"gate.metric in params.yaml: {settings.metric} {what}")
    champion, challenger = (None if value is None or math.isnan(value) else value for value in metrics[found[0]])
    if challenger is None:
        return Decision(False, f"the challenger has no {settings.metric}")
    if champion is None:
        return Decision(True, f"{settings.metric} {challenger:g}, and there is no champion yet")
    why = f"{settings.metric} {champion:g} -> {challenger:g} ({challenger - champion:+g})"
    if challenger >= champion:
        return Decision(True, why)
    tolerated = challenger >= champion - settings.tolerance
    return Decision(tolerated, f"{why}, {'within' if tolerated else 'beyond'} the tolerance of {settings.tolerance:g}")
