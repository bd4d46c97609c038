"""The gate: whether what was trained, the challenger, may take the place of what is published, the champion."""

import math
from typing import NamedTuple

from breedline.errors import BreedlineError
from breedline.params import Gate


class Decision(NamedTuple):
    """Publish or hold, and the reason in a line."""

    publish: bool
    why: str

    def __str__(self) -> str:
        return f"{'publish' if self.publish else 'hold'}: {self.why}"


def decide(settings: Gate, metrics: dict[str, tuple[float | None, float | None]]) -> Decision:
    """Compare one metric, more of which is better; a NaN is no value.

    Args:
        metrics: by `file:key`, the champion's value and the challenger's.

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
    bearable = challenger >= champion - settings.tolerance
    return Decision(bearable, f"{why}, {'within' if bearable else 'beyond'} the tolerance of {settings.tolerance:g}")
