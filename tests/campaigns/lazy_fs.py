"""A disk whose power can be cut: a folder mounted elsewhere, where only what was synced is sure to outlive `cut`.

All goes to the folder behind it at once, so it can be read, locked and mapped as any other. But it remembers how the disk
would stand: what each file had when it was synced last, and how to undo each change of names since. As in ext4's journal,
a sync of anything commits all changes of names and lengths before it, and those that are lost are the last ones. What
else the disk has got is a matter of chance: of a file that was not synced nothing, the beginning, or all; of the changes
of names any number. A new name does not wait for the data, as it does with ext4's `auto_da_alloc`. Modes and times are kept.

It needs root, FUSE, libfuse (libfuse2 or libfuse3-3 of Debian) and the package mfusepy; where one is missing, its tests are skipped.
"""

import ctypes.util
import importlib.util
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = 4096
SECONDS = 20
"""In which it is mounted, and unmounted."""
ATTRIBUTES = ("gid", "ino", "mode", "nlink", "size", "uid", "atime_ns", "ctime_ns", "mtime_ns")


class Disk:
    """The folder `mounted`, which has all that is in `behind` while it is on."""

    def __init__(self, behind: Path, mounted: Path, chance: random.Random) -> None:
        self.behind, self.mounted, self.chance = behind, mounted, chance
        behind.mkdir()
        mounted.mkdir()

    def on(self) -> None:
        seed = str(self.chance.randrange(1 << 32))
        command = [sys.executable, "-m", "tests.campaigns.lazy_fs", str(self.behind), str(self.mounted), seed]
        self._process = subprocess.Popen(command, cwd=ROOT)
        _wait(lambda: self.mounted.is_mount() or self._process.poll() is not None)
        assert self._process.poll() is None, "it cannot be mounted"

    def off(self) -> None:
        """The power fails. Whoever used it has been killed."""
        _wait(lambda: subprocess.run(["umount", str(self.mounted)], capture_output=True).returncode == 0)
        assert self._process.wait(SECONDS) == 0

    def cut(self) -> None:
        """The power fails, and comes back."""
        self.off()
        self.on()


def lacking() -> str:
    """Why there is no such disk here, or nothing."""
    if not importlib.util.find_spec("mfusepy"):
        return "the package mfusepy is not installed"
    if not ctypes.util.find_library("fuse") and not ctypes.util.find_library("fuse3"):
        return "libfuse is not installed"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as error:
        return f"no file system can be mounted here: {error}"
    return "" if os.geteuid() == 0 else "only root can unmount"


def _wait(done: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < end, "the disk is in use"
        time.sleep(0.02)


class LazyFS:
    """What libfuse asks for, one thing after the other; paths begin with a slash, and none is needed where there is a file."""

    use_ns = flag_nullpath_ok = flag_nopath = True

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.unsynced: dict[int, tuple[int, bytes]] = {}
        """By inode: the file, open, and what the disk has of it."""
        self.changes: list[Callable[[], object]] = []
        """How to undo each change of names that no sync has committed."""
        self.removed = folder.with_name(f"{folder.name}-removed")
        self.removed.mkdir(exist_ok=True)

    def destroy(self, _: str) -> None:
        """The power fails."""
        lost = self.chance.choice([0, len(self.changes), self.chance.randint(0, len(self.changes))])
        for undo in reversed(self.changes[len(self.changes) - lost :]):
            undo()
        self._commit()
        for file, on_disk in self.unsynced.values():
            stat = os.fstat(file)
            written = self.chance.choice([0, stat.st_size, self.chance.randint(0, stat.st_size) // PAGE * PAGE])
            content = os.pread(file, written, 0) + (on_disk[written:] if written < stat.st_size else b"")
            os.pwrite(file, content, 0)
            os.truncate(file, len(content))
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def _at(self, path: str) -> Path:
        return self.folder / path[1:]

    # what is in files

    def open(self, path: str, flags: int) -> int:
        file = os.open(self._at(path), flags & ~(os.O_TRUNC | os.O_APPEND))
        if flags & os.O_TRUNC:
            self.truncate(path, 0, file)
        return file

    def create(self, path: str, mode: int) -> int:
        file = os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        self.changes.append(self._at(path).unlink)
        return file

    def read(self, _: str, size: int, offset: int, file: int) -> bytes:
        return os.pread(file, size, offset)

    def write(self, _: str, data: bytes, offset: int, file: int) -> int:
        self._on_disk(file)
        return os.pwrite(file, data, offset)

    def truncate(self, path: str, length: int, file: int | None = None) -> None:
        opened = os.open(self._at(path), os.O_RDWR) if file is None else file
        kept, on_disk = self._on_disk(opened)
        self.unsynced[os.fstat(opened).st_ino] = kept, on_disk[:length]
        os.truncate(opened, length)
        if file is None:
            os.close(opened)

    def _on_disk(self, file: int) -> tuple[int, bytes]:
        """What the disk has of a file that is about to change."""
        stat = os.fstat(file)
        if stat.st_ino not in self.unsynced:
            kept = os.open(f"/proc/self/fd/{file}", os.O_RDWR)
            self.unsynced[stat.st_ino] = kept, os.pread(kept, stat.st_size, 0)
        return self.unsynced[stat.st_ino]

    def fsync(self, _path: str, _datasync: int, file: int) -> None:
        if found := self.unsynced.pop(os.fstat(file).st_ino, None):
            os.close(found[0])
        self._commit()

    def release(self, _: str, file: int) -> None:
        os.close(file)

    # names

    def fsyncdir(self, _path: str, _datasync: int, _file: int) -> None:
        self._commit()

    def _commit(self) -> None:
        self.changes.clear()
        for file in self.removed.iterdir():
            file.unlink()

    def mkdir(self, path: str, mode: int) -> None:
        self._at(path).mkdir(mode)
        self.changes.append(self._at(path).rmdir)

    def rmdir(self, path: str) -> None:
        mode = self._at(path).stat().st_mode
        self._at(path).rmdir()
        self.changes.append(partial(self._at(path).mkdir, mode))

    def symlink(self, path: str, target: str) -> None:
        self._at(path).symlink_to(target)
        self.changes.append(self._at(path).unlink)

    def link(self, path: str, target: str) -> None:
        self._at(path).hardlink_to(self._at(target))
        self.changes.append(self._at(path).unlink)

    def unlink(self, path: str) -> None:
        kept = self.removed / str(len(self.changes))
        self._at(path).rename(kept)
        self.changes.append(partial(kept.rename, self._at(path)))

    def rename(self, old: str, new: str) -> None:
        before, after = self._at(old), self._at(new)
        kept = self.removed / str(len(self.changes))
        if os.path.lexists(after) and not after.is_dir():
            os.link(after, kept, follow_symlinks=False)
        elif after.is_dir():
            self.rmdir(new)
        before.rename(after)

        def undo() -> None:
            after.rename(before)
            if os.path.lexists(kept):
                kept.rename(after)

        self.changes.append(undo)

    # all else is as in the folder

    def getattr(self, path: str, file: int | None = None) -> dict[str, int]:
        stat = os.lstat(self._at(path)) if file is None else os.fstat(file)
        return {f"st_{name.removesuffix('_ns')}": getattr(stat, f"st_{name}") for name in ATTRIBUTES}

    def opendir(self, path: str) -> int:
        return os.open(self._at(path), os.O_RDONLY)

    def readdir(self, _: str, folder: int) -> list[tuple[str, dict[str, int], int]]:
        here = os.fstat(folder)
        found = {".": here, "..": here}
        with os.scandir(folder) as entries:
            found |= {entry.name: entry.stat(follow_symlinks=False) for entry in entries}
        return [(name, {"st_ino": stat.st_ino, "st_mode": stat.st_mode}, 0) for name, stat in found.items()]

    releasedir = release

    def readlink(self, path: str) -> str:
        return str(self._at(path).readlink())

    def chmod(self, path: str, mode: int) -> None:
        self._at(path).chmod(mode)

    def utimens(self, path: str, times: tuple[int, int]) -> None:
        os.utime(self._at(path), ns=times, follow_symlinks=False)

    def statfs(self, path: str) -> dict[str, int]:
        stat = os.statvfs(self._at(path))
        return {name: getattr(stat, name) for name in dir(stat) if name.startswith("f_")}


def main(behind: str, mounted: str, seed: str) -> None:
    import mfusepy  # which cannot be imported where there is no libfuse

    os.umask(0)  # the kernel has applied that of who asks

    options = {"use_ino": True, "hard_remove": True, "default_permissions": True, "foreground": True, "nothreads": True}
    mfusepy.FUSE(LazyFS(Path(behind), random.Random(int(seed))), mounted, **options)  # noqa: S311


if __name__ == "__main__":
    main(*sys.argv[1:])
