"""Shard sets: many small images as a few plain tar volumes and one index.

DVC pays about a millisecond for each file and each operation, so images travel in volumes. A volume is an ordinary,
deterministic tar (`tar xf data/raw/*.tar` gets the files back); `index.csv` says where each image lies, so reading one
is a single positioned read: no tar parsing, no extraction, in any order, from any thread. The index is written last: a
folder that has one is complete.
"""

import hashlib
import re
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
VOLUME_NAME = re.compile(r"[0-9]{2,6}-[0-9]{5,9}\.tar")
"""The names that `pack` gives to volumes. Any other in an index is refused, since it could lead out of the folder."""
LEADS_OUT = re.compile(r"^/|(^|/)\.\.(/|$)")
"""A file name that leads out of the folder into which a tar is unpacked."""
VOLUME_BYTES = 128 * 2**20
"""A volume is closed when the next file would take it over this many bytes."""


class Entry(NamedTuple):
    """One file of a shard set: the place of its bytes and what it is. `format` is "" for anything but an image."""

    name: str
    shard: str
    offset: int
    size: int
    sha256: str
    format: str


COLUMNS = list(Entry._fields)
PRESIZED_COLUMNS = [*COLUMNS, "height", "width", "made", "origin"]
"""The index of a presized set also has each image's size in pixels, how it was made, and the raw file's SHA-256."""
MAX_SIDE = 65_535
"""Pixels of the longest side that a JPEG can have."""
INTEGERS = ["offset", "size", "height", "width"]
"""The columns that hold numbers, not text."""
REPEATED = ["shard", "format"]
"""The columns that say the same of many images."""


class Volume:
    """One tar being written. Equal files in equal order give equal bytes on every machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        # a large buffer, so that an image is one write; closed in __exit__
        self._tar = tarfile.TarFile(path, "w", format=tarfile.PAX_FORMAT, copybufsize=2**20)

    def add(self, name: str, file: IO[bytes], size: int) -> Entry:
        """Append the `size` bytes of `file`, hashed while they are copied and never in memory as a whole.

        Raises:
            BreedlineError: `name` leads out of the folder in which the volume is unpacked.
        """
        if LEADS_OUT.search(name):
            raise BreedlineError(f"a file is called {name!r}, which leads out of its folder: give it another name")
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
        else:  # the file is about to be thrown away, and TarFile.close would write more to it
            self._tar.fileobj.close()


class _HashingReader:
    """A file that hashes what is read from it, and keeps its first 32 bytes."""

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
    """Write the index, which marks the shard set in `folder` as complete."""
    write_csv(table, folder / INDEX)


class ShardSet:
    """A shard set to read from: `index` is its table, `read` gives the bytes of one row."""

    def __init__(self, folder: Path, columns: list[str] = COLUMNS) -> None:
        """Open the set in `folder` and check its index, since it may come from anybody.

        Raises:
            BreedlineError: there is no index, or it names a file that is not a volume of the set, or bytes outside of it.
        """
        self.folder = folder
        if not (folder / INDEX).is_file():
            raise BreedlineError(f"{folder} holds no whole shard set: run `dvc repro`, or `dvc checkout` to restore it")
        integers = [column for column in columns if column in INTEGERS]
        self.index = read_csv(folder / INDEX, columns, integers, repeated=REPEATED)
        sizes = {shard: self._size_of(shard) for shard in self.index["shard"].unique()}
        outside = self.index.loc[~lies_within(self.index, self.index["shard"].map(sizes).astype("int64")), "shard"]
        if len(outside):
            raise BreedlineError(
                f"{folder / outside.iloc[0]} is cut short, or {folder / INDEX} is damaged: `dvc checkout` restores both"
            )
        for side in [column for column in ("height", "width") if column in columns]:
            wrong = self.index.loc[~self.index[side].between(1, MAX_SIDE), side]
            if len(wrong):
                raise BreedlineError(
                    f"{folder / INDEX} is damaged: no JPEG has a {side} of {wrong.iloc[0]} pixels; `dvc checkout` restores it"
                )

    def _size_of(self, shard: str) -> int:
        """The size in bytes of a volume that the index names."""
        path = self.folder / shard
        if not VOLUME_NAME.fullmatch(shard):
            raise BreedlineError(
                f"{self.folder / INDEX} is damaged: {shard[:80]!r} is no volume of a shard set; `dvc checkout` restores it"
            )
        if path.is_symlink():
            raise BreedlineError(
                f"{path} is a link, which could lead anywhere: set DVC's cache.type to reflink,copy and run "
                "`dvc checkout --relink`"
            )
        if not path.is_file():
            raise BreedlineError(f"{path} is missing: `dvc checkout` restores it")
        return path.stat().st_size

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset` of volume `shard`."""
        return read_at(self.folder / shard, offset, size)


def lies_within(table: pd.DataFrame, volume_bytes: "int | pd.Series[int]") -> "pd.Series[bool]":
    """Whether the bytes of each row (offset, size) lie within its volume, which has `volume_bytes`."""
    # the sum of both could overflow int64; the difference does so only where one of the first two conditions is false
    return (table["offset"] >= 0) & (table["size"] >= 0) & (table["size"] <= volume_bytes - table["offset"])


def read_at(volume: Path, offset: int, size: int) -> bytes:
    """The `size` bytes at `offset` of a volume.

    A plain read instead of a memory map: as fast from the page cache, safe in any thread or process, and not counted as
    memory of the process.
    """
    with volume.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)
