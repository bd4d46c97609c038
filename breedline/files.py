"""Files that are either whole or absent, tables that keep their text, and the folder that outlives a run."""

import csv
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pandas as pd
import platformdirs

from breedline.errors import BreedlineError


def cache_dir(name: str) -> Path:
    """The per-machine folder `name`: $BREEDLINE_CACHE, else the user's cache folder. Safe to delete at any time."""
    root = os.environ.get("BREEDLINE_CACHE") or platformdirs.user_cache_dir("breedline")
    folder = Path(root).expanduser() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; it takes the place of `path` only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.unlink(missing_ok=True)  # a killed run may have had the same number
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` only when the block ends well.

    The names are fixed, so that what a killed run left behind is removed by the next one.
    """
    temporary, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    _remove(temporary, old)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rename(old)  # removing takes time, and a kill meanwhile would leave a part of it
        temporary.rename(path)
    finally:
        _remove(temporary, old)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


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


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_code() -> str:
    """One hash of the project's own modules, by name and content."""
    root = Path(__file__).parents[1]
    code = hashlib.sha256()
    for file in sorted([*root.glob("breedline/*.py"), *root.glob("stages/*.py")]):
        code.update(f"{file.relative_to(root).as_posix()} {sha256_of(file)}\n".encode())
    return code.hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Give `target` the bytes of `source`: for free where both are on one file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def fingerprint(paths: Iterable[Path]) -> dict[str, tuple[int, int, int]]:
    """(inode, size, time of change) of every file at or below `paths`: tells whether one was touched."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return {str(file): (s.st_ino, s.st_size, s.st_mtime_ns) for file in files for s in [file.stat()]}
