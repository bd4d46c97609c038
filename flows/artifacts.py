"""What a run leaves to look at in the Prefect UI: tables and pictures."""

import base64
import json
import mimetypes
import re
from pathlib import Path
from typing import Any

import pandas as pd
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.plan import Step, rows
from flows.repo import metrics

ROWS = 500
"""Of a longer table only the beginning is shown: it is kept by the server."""


def show_plan(steps: list[Step]) -> None:
    """What is about to happen, and why."""
    create_table_artifact(rows(steps), key="plan", description="What was to happen to each stage, and why")


def show_results(root: Path, steps: list[Step], results: list[dict[str, Any]]) -> None:
    """What happened; and of what was made anew, the metrics and what the stages have to show."""
    create_table_artifact(results, key="summary", description="What happened to each stage")
    new = {result["stage"] for result in results if result["state"] in ("Completed", "Restored")}
    if not new:
        return
    if table := metrics(root):
        create_table_artifact(changes(table), key="metrics", description="The metrics, and those of the last commit")
    for step in steps:
        for path in step.policy.show if step.stage in new else []:
            _show(step.stage, root / path, path)


def changes(table: dict[str, tuple[float | None, float | None]]) -> list[dict[str, Any]]:
    """Metrics as rows of a table: the committed value, the present one, the difference; what has changed comes first."""
    rows = [
        {
            "metric": name,
            "committed": old,
            "now": new,
            "difference": None if old is None or new is None else round(new - old, 6),
        }
        for name, (old, new) in table.items()
    ]
    return sorted(rows, key=lambda row: row["difference"] == 0)


def _show(stage: str, file: Path, path: str) -> None:
    key = re.sub(r"[^a-z0-9]+", "-", f"{stage}-{file.stem}".lower())
    kind = mimetypes.guess_type(file.name)[0] or ""
    if file.suffix == ".csv":
        table = pd.read_csv(file, nrows=ROWS)
        create_table_artifact(json.loads(table.to_json(orient="records")), key=key, description=path)
    elif kind.startswith("image/"):
        picture = base64.b64encode(file.read_bytes()).decode()
        create_markdown_artifact(f"![{path}](data:{kind};base64,{picture})", key=key, description=path)
