"""data/corrections.csv: what people have decided about single images."""

import csv
from pathlib import Path

import pandas as pd

from breedline.errors import BreedlineError
from breedline.tables import read_csv

CORRECTION = ["name", "sha256", "action", "label", "reason"]


def read_corrections(corrections: Path) -> pd.DataFrame:
    """The decisions: name, sha256 (lower case), action (relabel or drop), label, reason; indexed by line number.

    Raises:
        BreedlineError: a line makes no sense, or two are about the same image.
    """
    table = read_csv(corrections, CORRECTION).set_axis(_line_numbers(corrections))
    table["sha256"] = table["sha256"].str.strip().str.lower()
    for number, action, label in zip(table.index, table["action"], table["label"], strict=True):
        if action not in ("relabel", "drop") or (action == "relabel") != bool(label):
            raise BreedlineError(
                f"{corrections}, line {number}: action {action!r} with label {label!r}; "
                "write relabel and a label, or drop and none"
            )
    twice = table.loc[table["sha256"].duplicated(), "name"].head(3).tolist()
    if twice:
        raise BreedlineError(f"{corrections} decides more than once on {twice}: leave one line for each")
    return table


def _line_numbers(table: Path) -> list[int]:
    """The line on which each record of a CSV table ends; blank lines are none."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        return [reader.line_num for row in reader if "".join(row).strip() or len(row) > 1][1:]
