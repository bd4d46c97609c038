"""Who is at work in a folder, told by the locks that they hold; looking touches none of them."""

import fcntl
import json
from pathlib import Path

import psutil

from breedline.files import cache_root, folder_key


def rwlock(root: Path) -> Path:
    """Where DVC notes which process is at work on which paths."""
    return root / ".dvc/tmp/rwlock"


def busy(root: Path) -> bool:
    """Whether a living process is at work in the folder `root`: a stage, or a dvc before, after or around one."""
    stages = (cache_root() / "locks").glob(f"{folder_key(root.resolve())}-*.lock")
    if any(map(held, [root / ".dvc/tmp/lock", *stages])):
        return True
    return any(_lives(pid, command, rwlock(root)) for pid, command in (holders(root) or {}).items())


def stage_at_work() -> bool:
    """Whether a stage is at work in any folder of this user."""
    return any(map(held, (cache_root() / "locks").glob("*.lock")))


def held(lock: Path) -> bool:
    """Whether a process holds a lock file, such as those of FileLock, which would write to it."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def holders(root: Path) -> dict[int, str] | None:
    """The processes that DVC has noted and their commands, those that were killed too; None if its notes make no sense."""
    try:
        noted = json.loads(rwlock(root).read_bytes())
        readers = (one for some in noted.get("read", {}).values() for one in some)
        return {int(one["pid"]): str(one["cmd"]) for one in (*noted.get("write", {}).values(), *readers)}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _lives(pid: int, command: str, notes: Path) -> bool:
    """Whether the process that was noted lives, rather than another one that has its number now.

    A clock that has jumped forward makes a process look younger than the note of it: then its command tells.
    """
    try:
        process = psutil.Process(pid)
        return process.create_time() <= notes.stat().st_mtime or " ".join(process.cmdline()).endswith(command)
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError, OverflowError, FileNotFoundError):
        return False
