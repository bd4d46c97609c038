"""What a change of the model changes, as one page for people: the gate's verdict, its numbers, and the images.

It is no output of the pipeline, which knows no champion.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from breedline.document import Thumbnails, write_page
from breedline.shards import ShardSet

MOST = 200
"""Images that are shown, at most."""
ROOM = 1.15
"""How much wider the scale of the difference is than what it has to show."""


def comparison_page(decision: Mapping[str, Any], answers: pd.DataFrame, images: ShardSet, path: Path) -> None:
    """Write the page of a decision of the gate.

    Args:
        decision: verdict, reasons, and the numbers that it is made of, as the gate records them.
        answers: of each test image name, sha256 (of the raw file), actual, champion, champion_probability, challenger,
            challenger_probability.
        images: the presized images.
    """
    right = {who: answers[who] == answers["actual"] for who in ("champion", "challenger")}
    other = answers["champion"] != answers["challenger"]
    groups = {
        "broken": answers[right["champion"] & ~right["challenger"]].sort_values(
            "challenger_probability", ascending=False, kind="stable"
        ),
        "fixed": answers[~right["champion"] & right["challenger"]].sort_values(
            "champion_probability", ascending=False, kind="stable"
        ),
        "other": answers[other & ~right["champion"] & ~right["challenger"]],
    }
    third = MOST // 3
    wanted = [*(table.head(third) for table in groups.values()), *groups.values()]
    shown = Thumbnails(images, pd.concat(wanted)["sha256"], MOST)
    write_page(
        "changed.html",
        path,
        shown,
        decision=decision,
        scale=_scale(decision),
        groups={
            name: {"all": len(table), "shown": table[table["sha256"].isin(list(shown))].to_dict("records")}
            for name, table in groups.items()
        },
    )


def _scale(decision: Mapping[str, Any]) -> dict[str, float] | None:
    """Where the difference and its interval lie on a scale from 0 to 100, whose middle is no difference."""
    if decision.get("difference") is None or decision.get("interval") is None:
        return None
    values = {"difference": decision["difference"], "low": decision["interval"][0], "high": decision["interval"][1]}
    reach = ROOM * max(map(abs, values.values())) or 1.0
    return {name: 50 + 50 * value / reach for name, value in values.items()}
