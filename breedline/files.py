"""Files that are either whole or absent, their hashes, and the folder that outlives a run."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from breedline.errors import BreedlineError


def cache_dir(name: str) -> Path:
    """The folder `name` of this machine's cache ($BREEDLINE_CACHE, else the user's). Safe to delete at any time.

    Raises:
        BreedlineError: there is a file in its place.
    """
    root = os.environ.get("BREEDLINE_CACHE") or platformdirs.user_cache_dir("breedline")
    try:
        folder = Path(root).expanduser() / name
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, RuntimeError) as error:  # the last: of expanduser, no such user
        raise BreedlineError(f"BREEDLINE_CACHE is {root}, which is no folder ({error}): set it to a folder") from error
    return folder


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; the file takes the place of `path` only when the block ends without an error.

    The temporary name is always the same, so that what a killed run left behind is removed by the next one. Processes
    that may write the same file at the same time need a lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _partial(path)
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` only when the block ends without an error; as `new_file`."""
    temporary, old = _partial(path), path.with_name(f".{path.name}.old")
    _remove(temporary, old)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rename(old)  # removing takes time, and a kill meanwhile would leave a part of it
        temporary.rename(path)
    finally:
        _remove(temporary, old)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
