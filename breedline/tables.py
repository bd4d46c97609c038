"""CSV tables that keep their text, and JSON: the same bytes on every system.

A spreadsheet runs a cell that begins like a formula, and names and labels come from images of any origin. Our tables
put an apostrophe before such a text, which a spreadsheet takes as text and `read_csv` removes again.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import pandas as pd
from pydantic import BaseModel, ValidationError

from breedline.errors import BreedlineError
from breedline.files import new_file

MAX_COLUMNS, MAX_BEGINNING = 1000, 100_000
"""Of a table, and bytes of its first two lines."""
Model = TypeVar("Model", bound=BaseModel)
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""How a cell begins that a spreadsheet may run (OWASP, "CSV injection")."""


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write `table` without its row numbers; a text that begins like a formula gets an apostrophe before it."""
    # text that has apostrophes before the formula gets one more, so that read_csv may always remove one
    table = _changed(table, table.columns, ("'", *FORMULA), lambda texts: "'" + texts)
    # csv leaves a carriage return bare, although readers take it for the end of the line
    returns = any(texts.str.contains("\r", regex=False, na=False).any() for _, texts in _texts(table).items())
    quoting: Any = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    with new_file(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", quoting=quoting)


def read_csv(
    file: Path | IO[bytes],
    columns: Collection[str],
    integers: Iterable[str] = (),
    where: str = "",
    repeated: Collection[str] = (),
    numbers: Iterable[str] = (),
    separator: str = ",",
) -> pd.DataFrame:
    """Read a table as text, whatever it says: a class may be called "NA", "null" or "007".

    An apostrophe before a text that begins like a formula is not part of it, in tables that people write, too: `'-x`
    is read as `-x`, `''-x` as `'-x`; `'t Hof` stays as it is.

    Args:
        columns: those that the table must have; others are left as they are written.
        integers: columns of whole numbers.
        where: what to call the file in an error, if it has no path.
        repeated: columns of few different words, which become categories; none of them begins like a formula.
        numbers: columns of finite numbers.

    Raises:
        BreedlineError: the file is not a table, or lacks one of `columns`.
    """
    if isinstance(file, Path):
        try:
            with file.open("rb") as opened:
                return read_csv(opened, columns, integers, where or str(file), repeated, numbers, separator)
        except IsADirectoryError as error:
            raise _no_table(str(file), error) from error
    types = defaultdict(
        lambda: "str",
        dict.fromkeys(integers, "int64") | dict.fromkeys(repeated, "category") | dict.fromkeys(numbers, "float64"),
    )
    try:
        _check_beginning(file, separator)
        with np.errstate(invalid="ignore"):  # a number that is infinite; the ValueError says it better
            table = pd.read_csv(file, sep=separator, dtype=types, keep_default_na=False)
        if not isinstance(table.index, pd.RangeIndex):
            raise ValueError("a line has more values than the first")
        if not all(np.isfinite(table[column]).all() for column in numbers if column in table):
            raise ValueError("a number is not finite")
    except (ValueError, OverflowError, csv.Error) as error:
        raise _no_table(where, error) from error
    if missing := [column for column in columns if column not in table]:
        found = _one_line(", ".join(map(str, table)))
        raise BreedlineError(f"{where} lacks the column {', '.join(missing)}; it has {found}")
    for name in repeated:  # of a column that has numbers only, pandas makes numbers
        table[name] = table[name].cat.rename_categories(str)
    return _changed(table, columns, ("'",), lambda texts: texts.str[1:])


def _check_beginning(file: IO[bytes], separator: str) -> None:
    """Refuse a table of so many columns that pandas would take minutes for them. Raises ValueError or csv.Error."""
    beginning = file.read(MAX_BEGINNING)
    file.seek(0)
    text = io.StringIO(beginning.decode("utf-8-sig", "replace"), newline="")
    records = (cells for cells in csv.reader(text, delimiter=separator) if len(cells) > 1 or "".join(cells).strip())
    header, first = next(records, []), next(records, [])
    if len(header) > MAX_COLUMNS:
        raise ValueError(f"over {MAX_COLUMNS} columns")
    if len(first) > len(header):
        raise ValueError("a line has more values than the first")
    if len(beginning) == MAX_BEGINNING and not text.read(1):
        raise ValueError(f"its first two lines have {MAX_BEGINNING:,} bytes or more")


def _no_table(where: str, error: Exception) -> BreedlineError:
    return BreedlineError(f"{where} is not a CSV table ({_one_line(error)}): save it as UTF-8, comma-separated")


def _texts(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that hold text."""
    return table.select_dtypes(["object", "string"])


def _changed(
    table: pd.DataFrame, columns: Collection[str], starts: tuple[str, ...], change: Callable[[pd.Series], pd.Series]
) -> pd.DataFrame:
    """`table` with those texts of `columns` changed that begin as one of `starts`, and like a formula after any apostrophes."""
    for name, texts in _texts(table[list(columns)]).items():
        some = texts[texts.str.startswith(starts, na=False)]
        some = some[some.str.lstrip("'").str.startswith(FORMULA)]
        if len(some):
            table = table.assign(**{str(name): texts.where(~texts.index.isin(some.index), change(some))})
    return table


def _one_line(said: object) -> str:
    words = " ".join(str(said).split())
    return words if len(words) <= 200 else words[:200] + "…"


def read_json(path: Path, model: type[Model]) -> Model:
    """The content of a JSON file that a stage has written.

    Raises:
        BreedlineError: it is damaged.
    """
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise BreedlineError(f"{path} is damaged ({where}: {first['msg']}): `dvc checkout` restores it") from error


def write_json(value: Any, path: Path) -> None:
    """Write `value` indented; floats as Python prints them."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
