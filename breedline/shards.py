"""Shard sets: many small images as a few plain tar volumes and one index.

DVC pays about a millisecond for each file and each operation, so images travel in volumes. A volume is an ordinary,
deterministic tar (`tar xf data/raw/*.tar` gets the files back); `index.csv` says where each image lies, so reading one
is a single positioned read: no tar parsing, nothing extracted, any order, any thread. The index is written last: a
folder that has one is whole.
"""

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

import pandas as pd

from breedline.errors import BreedlineError
from breedline.formats import sniff
from breedline.tables import read_csv, write_csv

INDEX = "index.csv"
VOLUME_BYTES = 128 * 2**20
"""A volume is closed when the next file would take it over this many bytes."""


class Entry(NamedTuple):
    """One file of a shard set: where it lies and what it is. `format` is "" for anything but an image."""

    name: str
    shard: str
    offset: int
    size: int
    sha256: str
    format: str


COLUMNS = list(Entry._fields)
PRESIZED_COLUMNS = [*COLUMNS, "height", "width", "made", "origin"]
"""A presized set says more: the image's pixels, how it was made, and the SHA-256 of the raw file."""


class Volume:
    """One tar being written. Equal files in equal order give equal bytes on every machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        # a large buffer, so that an image is one write; closed in __exit__
        self._tar = tarfile.TarFile(path, "w", format=tarfile.PAX_FORMAT, copybufsize=2**20)

    def add(self, name: str, file: IO[bytes], size: int) -> Entry:
        """Append the `size` bytes of `file`; they are hashed on their way, never held whole."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        reader = _HashingReader(file)
        self._tar.addfile(info, reader)  # type: ignore[arg-type]
        padded = -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self.size = self._tar.offset
        return Entry(name, self.path.name, self.size - padded, size, reader.sha256.hexdigest(), sniff(reader.head))

    def __enter__(self) -> "Volume":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is None:
            self._tar.close()
        else:  # what was written is about to be thrown away, and closing would try to write more
            self._tar.fileobj.close()


class _HashingReader:
    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.head = file, hashlib.sha256(), b""

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.sha256.update(data)
        self.head += data[: 32 - len(self.head)]
        return data


def pack(
    files: Iterable[tuple[str, int, IO[bytes]]], folder: Path, prefix: str, volume_bytes: int = VOLUME_BYTES
) -> Iterator[Entry]:
    """Write (name, size, content) files into volumes PREFIX-00000.tar, PREFIX-00001.tar, … of `folder`, in order."""
    with ExitStack() as current:
        volume, number = None, 0
        for name, size, content in files:
            if volume is None or volume.size + size > volume_bytes:
                current.close()
                volume = current.enter_context(Volume(folder / f"{prefix}-{number:05d}.tar"))
                number += 1
            yield volume.add(name, content, size)


def write_index(table: pd.DataFrame, folder: Path) -> None:
    """Complete the shard set in `folder`: from here on it counts as whole."""
    write_csv(table, folder / INDEX)


class ShardSet:
    """A shard set to read from: `index` is its table, `read` gives the bytes of one row."""

    def __init__(self, folder: Path, columns: list[str] = COLUMNS) -> None:
        """Open the set in `folder`. Raises BreedlineError when it has no index or a volume is missing or short."""
        self.folder = folder
        if not (folder / INDEX).is_file():
            raise BreedlineError(f"{folder} holds no whole shard set: run `dvc repro`, or `dvc checkout` to restore it")
        integers = [c for c in columns if c in ("offset", "size", "height", "width")]
        self.index = read_csv(folder / INDEX, columns, integers)
        ends = (self.index["offset"] + self.index["size"]).groupby(self.index["shard"]).max()
        for shard, end in ends.items():
            path = folder / str(shard)
            if not path.is_file() or path.stat().st_size < end:
                raise BreedlineError(f"{path} is missing or cut short: `dvc checkout` restores it")

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset` of volume `shard`."""
        return read_at(self.folder / shard, offset, size)


def read_at(volume: Path, offset: int, size: int) -> bytes:
    """The `size` bytes at `offset` of a volume.

    A plain read rather than a memory map: as fast from the page cache, safe from any thread or process, and the
    volumes do not count as this process's memory.
    """
    with volume.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)
