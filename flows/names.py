"""Names of flow runs that tell them apart in a list."""

import textwrap

from prefect.runtime import deployment, flow_run

from breedline.urls import redacted

FROM_WATCH = "source"
"""The tag of runs that `watch` has started."""


def run_name() -> str:
    """What asked for the present flow run, and what it asked for: `on-demand main: train.epochs=20, force download`."""
    asked = FROM_WATCH if FROM_WATCH in flow_run.tags else deployment.name or "by hand"
    given = flow_run.parameters
    details = [f"{key}={value}" for key, value in (given.get("overrides") or {}).items()]
    details += [f"force {stage}" for stage in given.get("force") or ()]
    name = " ".join([asked, *([given["ref"]] if "ref" in given else [])])
    whole = f"{name}: {', '.join(details)}" if details else name
    return textwrap.shorten(redacted(whole), 120, placeholder=" …")
