"""CSV tables that keep their text, and JSON: the same bytes on every system."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import pandas as pd

from breedline.errors import BreedlineError
from breedline.files import new_file


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write `table` without its row numbers; the same bytes on every system."""
    text = table.to_csv(index=False, lineterminator="\n")
    if "\r" in text:  # which csv leaves bare, although readers take it for the end of the line
        text = table.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    with new_file(path) as temporary:
        temporary.write_text(text, "utf-8", newline="")


def read_csv(
    file: Path | IO[bytes], columns: Iterable[str], integers: Iterable[str] = (), where: str = ""
) -> pd.DataFrame:
    """Read a table as text, whatever it says: a class may be called "NA", "null" or "007".

    Args:
        integers: columns of whole numbers.
        where: what to call the file in an error, if it has no path.

    Raises:
        BreedlineError: the file is not a table, or lacks one of `columns`.
    """
    where = where or str(file)
    types = defaultdict(lambda: "str", dict.fromkeys(integers, "int64"))
    try:
        table = pd.read_csv(file, dtype=types, keep_default_na=False)
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("a line has more values than the first")
        if missing := [column for column in columns if column not in table]:
            raise BreedlineError(f"{where} lacks the column {', '.join(missing)}; it has {', '.join(map(str, table))}")
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise BreedlineError(f"{where} is not a CSV table ({reason}): save it as UTF-8, comma-separated") from error
    return table


def write_json(value: Any, path: Path) -> None:
    """Write `value` indented; floats as Python prints them."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
