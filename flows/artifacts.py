"""Artifacts of a run in the Prefect UI: tables and pictures."""

import base64
import json
import mimetypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.plan import Step, rows
from flows.repo import metrics
from flows.states import Outcome

MARKUP = re.compile(
    r"(?P<indent>^\s*)(?P<mark>[-=>#+])"  # blocks: lists, headings, quotations
    r"|[\\`*\[\]<&~|]|(?<![^\W_])_|_(?![^\W_])"  # a `_` within a word is only a letter: american_bulldog
    r"|:(?=//)|(?<=www)\.|@(?=[\w-]+\.)"  # what becomes a link by itself
    r"|(?<=\d)[.)](?=\s|$)",  # numbered lists
    re.MULTILINE,
)
ROWS = 500
"""The most rows of a table that are shown, as the server stores them."""


def show_plan(steps: list[Step]) -> None:
    """Show what will happen to each stage, and why."""
    _create_table(rows(steps), key="plan", description="What was to happen to each stage, and why")


def show_results(root: Path, steps: list[Step], results: list[dict[str, Any]]) -> None:
    """Show what happened to each stage; after changes also the metrics, and the outputs that the stages' policies show."""
    _create_table(results, key="summary", description="What happened to each stage")
    new = {result["stage"] for result in results if result["state"] in (Outcome.COMPLETED, Outcome.RESTORED)}
    if not new:
        return
    if table := metrics(root):
        _create_table(changes(table), key="metrics", description="The metrics, and those of the last commit")
    for step in steps:
        for path in step.policy.show if step.stage in new else []:
            if (root / path).exists():  # a head that is published alone has no curves
                _show(step.stage, root / path, path)


def show_scores(labels: Mapping[str, int]) -> None:
    """Show how many new photos have each label, the most first."""
    rows = [{"label": label, "photos": photos} for label, photos in sorted(labels.items(), key=lambda row: -row[1])]
    _create_table(rows[:ROWS], key="scores", description="New photos with each label")


def show_decision(verdict: str, rows: list[dict[str, Any]], changed: pd.DataFrame) -> None:
    """Show what the gate says, with its reasons and numbers; and the images that only one of both models gets right."""
    _create_table(rows, key="decision", description=f"The gate says: {verdict}")
    if len(changed):
        cells = json.loads(changed.head(ROWS).to_json(orient="records"))
        _create_table(cells, key="changed-answers", description="Test images that only one of both models gets right")


def changes(table: dict[str, tuple[float | None, float | None]]) -> list[dict[str, Any]]:
    """Metrics as rows of a table: committed value, present value, difference. Changed metrics come first."""
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


def text(content: str) -> str:
    """Markdown that renders as `content`: Prefect's UI renders cells and descriptions, which may hold anybody's labels."""
    return MARKUP.sub(lambda found: f"{found['indent'] or ''}\\{found['mark'] or found[0]}", content)


def _create_table(rows: list[dict[str, Any]], key: str, description: str) -> None:
    cells = [{name: text(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows]
    create_table_artifact(cells, key=key, description=text(description))


def _show(stage: str, file: Path, path: str) -> None:
    key = re.sub(r"[^a-z0-9]+", "-", f"{stage}-{file.stem}".lower())
    kind = mimetypes.guess_type(file.name)[0] or ""
    if file.suffix == ".csv":
        table = pd.read_csv(file, nrows=ROWS)
        _create_table(json.loads(table.to_json(orient="records")), key=key, description=path)
    elif kind.startswith("image/"):
        picture = base64.b64encode(file.read_bytes()).decode()
        create_markdown_artifact(f"![{text(path)}](data:{kind};base64,{picture})", key=key, description=text(path))
    elif kind == "text/html":  # too large for the server, which would not run its script either
        said = f"`{path}` is a page of its own. Once the run is published, `git pull && dvc pull {path}` brings it."
        create_markdown_artifact(said, key=key, description=text(path))
