"""data/corrections.csv: what people have decided about single images."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from breedline.errors import BreedlineError
from breedline.tables import read_csv

CORRECTION = ["name", "sha256", "action", "label", "reason"]
LINE_END = re.compile(r"\r\n|\r|\n")


def read_corrections(corrections: Path) -> pd.DataFrame:
    """The decisions: name, sha256 (lower case), action (relabel or drop), label, reason; indexed by line number.

    Lines that decide the same about an image, as several people's files have when git merges them, are one decision.

    Raises:
        BreedlineError: a line makes no sense, or two decide differently about the same image.
    """
    table = read_csv(corrections, CORRECTION)
    records = [list(table), *table.itertuples(index=False)]
    table = table.set_axis(list(_line_numbers(corrections.read_text("utf-8-sig"), records))[1:])
    table["sha256"] = table["sha256"].str.strip().str.lower()
    for number, action, label in zip(table.index, table["action"], table["label"], strict=True):
        if action not in ("relabel", "drop") or (action == "relabel") != bool(label):
            raise BreedlineError(
                f"{corrections}, line {number}: action {action!r} with label {label!r}; "
                "write relabel and a label, or drop and none"
            )
    table = table[~table.duplicated(["sha256", "action", "label"])]
    for _, lines in table[table["sha256"].duplicated(keep=False)].groupby("sha256", sort=False):
        numbers = " and ".join(map(str, lines.index))
        raise BreedlineError(
            f"{corrections} has more than one decision on {lines['name'].iloc[0]!r}: leave one of the lines {numbers}"
        )
    return table


def _line_numbers(text: str, records: Iterable[Iterable[str]]) -> Iterator[int]:
    """The number, from 1, of the line on which each record of a CSV table begins: some span lines, and blank ones are none."""
    lines = LINE_END.split(text)
    line = 0
    for cells in records:
        while line < len(lines) and not lines[line].strip():
            line += 1
        yield line + 1
        line += 1 + sum(len(LINE_END.findall(cell)) for cell in cells)
