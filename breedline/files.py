"""Files that are written completely or not at all, even where the power fails; hashes of files, and the cache folder that outlives a run."""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from breedline.errors import BreedlineError


def cache_root() -> Path:
    """$BREEDLINE_CACHE, or else the user's cache folder, which need not be there yet.

    Raises:
        BreedlineError: it is in the home of somebody who has none.
    """
    root = _cache()
    try:
        return Path(root).expanduser()
    except RuntimeError as error:
        raise _no_folder(root, error) from error


def cache_dir(name: str) -> Path:
    """The folder `name` in the cache of this user, made if it is missing. It may be deleted at any time.

    Raises:
        BreedlineError: it cannot be a folder, because a file has its name.
    """
    folder = cache_root() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise _no_folder(_cache(), error) from error
    return folder


def _cache() -> str:
    return os.environ.get("BREEDLINE_CACHE") or platformdirs.user_cache_dir("breedline")


def _no_folder(root: str, error: Exception) -> BreedlineError:
    return BreedlineError(f"BREEDLINE_CACHE is {root}, which is no folder ({error}): set it to a folder")


def folder_key(folder: Path) -> str:
    """A short name of a folder, for what the cache keeps of it."""
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to, beside `path`; its file replaces `path` when the block ends without an error.

    It is on the disk then. It always has the same name, so that the next run removes what a killed one left behind.
    Processes that may write the same file at the same time need a lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _partial(path)
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        sync(temporary)  # or a power loss may leave the name without the bytes
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the disk has all that was written to a file, or all names in a folder; no-op on file systems that cannot."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write to, beside `path`, which it replaces when the block ends without an error.

    It always has the same name, as the file of `new_file` has. A power loss may leave it without its bytes: it is mostly
    an output of a stage, which DVC copies without a sync as well, and which can be made again.
    """
    temporary, old = _partial(path), _old(path)
    _remove(temporary, old)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            path.rename(old)  # removing takes time, and a kill meanwhile would leave a part of it
        temporary.rename(path)
    finally:
        _remove(temporary, old)


def leftovers_of(path: Path) -> list[Path]:
    """What a killed process has left beside `path`, or a living one is writing there."""
    return [beside for beside in (_partial(path), _old(path)) if beside.exists()]


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if they are on different file systems."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def fingerprint(paths: Iterable[Path]) -> dict[str, tuple[int, int, int]]:
    """Inode, size and modification time (ns) of every file at or below `paths`, to see whether one was changed."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return {str(file): (s.st_ino, s.st_size, s.st_mtime_ns) for file in files for s in [file.stat()]}
