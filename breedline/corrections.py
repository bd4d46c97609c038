"""data/corrections.csv: what people have decided about single images."""

from pathlib import Path

import pandas as pd

from breedline.errors import BreedlineError
from breedline.tables import read_csv

CORRECTION = ["name", "sha256", "action", "label", "reason"]


def read_corrections(corrections: Path) -> pd.DataFrame:
    table = read_csv(corrections, CORRECTION)
    for number, row in enumerate(table.to_dict("records"), start=2):
        if row["action"] not in ("relabel", "drop") or (row["action"] == "relabel") != bool(row["label"]):
            raise BreedlineError(
                f"{corrections}, line {number}: action {row['action']!r} with label {row['label']!r}; "
                "write relabel and a label, or drop and none"
            )
    twice = table.loc[table["sha256"].duplicated(), "name"].head(3).tolist()
    if twice:
        raise BreedlineError(f"{corrections} decides more than once on {twice}: leave one line for each")
    return table
