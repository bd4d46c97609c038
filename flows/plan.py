"""`python -m flows.plan`: what `dvc repro`, or the flow, would do in this folder, and why. Changes nothing."""

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from breedline.errors import BreedlineError
from flows.repo import Action, Step, plan

STYLES = {Action.UP_TO_DATE: "green", Action.RESTORE: "cyan", Action.RUN: "yellow"}


def rows(steps: list[Step]) -> list[dict[str, str]]:
    """The plan as a table of texts."""
    return [{"stage": step.stage, "action": step.action.value, "why": "; ".join(step.why)} for step in steps]


def main() -> None:
    """Print the plan of the working folder."""
    try:
        steps = plan(Path())
    except BreedlineError as error:
        sys.exit(f"error: {error}")
    table = Table("stage", "action", "why", box=None, header_style="bold")
    for step, row in zip(steps, rows(steps), strict=True):
        table.add_row(row["stage"], f"[{STYLES[step.action]}]{row['action']}[/]", row["why"])
    Console().print(table)


if __name__ == "__main__":
    main()
