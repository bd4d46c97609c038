"""The presized shard set, and the per-machine cache that spares decoding an image twice.

Each raw volume gives one presized volume. The cache keeps presized volumes, each beside a table of its images, under the
hash of everything that decides their bytes. A volume of the same images as before is linked from the cache; for any other
volume, images that the cache has are copied, and only the rest is decoded. Each volume goes to the cache as soon as it is
finished, so a killed run loses only the one that it was working on.

On a cluster (cluster.py) one task is one volume: the worker puts it into the cache, which all machines share, and returns
how many of its images it took from there. Here the volume is then found in the cache.
"""

import contextlib
import hashlib
import io
import itertools
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd
from filelock import FileLock
from joblib import Parallel, delayed, parallel_config

from breedline.cluster import VARIABLE, each, is_set
from breedline.errors import BreedlineError
from breedline.files import cache_dir, link_or_copy, new_file
from breedline.images import DECODER, MAX_PIXELS, VERSION, Presized, Undecodable, presize_image
from breedline.params import Presize
from breedline.shards import INTEGERS, PRESIZED_COLUMNS, Volume, lies_within, read_at
from breedline.tables import read_csv, write_csv

log = logging.getLogger("breedline")

PART_COLUMNS = [*PRESIZED_COLUMNS, "rejected"]
"""The table of a cached volume also lists the rejected images, with size 0 and the reason."""
Row = dict[str, Any]
SEEN_BY_WORKERS = ["name", "offset", "size", "sha256"]
"""The columns of the raw index that a volume is made of."""
UNUSED_DAYS = 30
SCRATCH_SECONDS = 86_400
"""After so long what a worker was making was left by a killed one."""
MAX_BYTES = 3 * MAX_PIXELS + 2**20
"""A larger file is rejected unread. MAX_PIXELS as uncompressed RGB take less, with up to a MiB of metadata."""


class PresizedVolume(NamedTuple):
    """The table (PART_COLUMNS) of one presized volume, and how many of its images came from the cache."""

    table: pd.DataFrame
    cached: int


class _Work(NamedTuple):
    """What a worker of a cluster is told of a volume to make."""

    raw: Path
    rows: pd.DataFrame
    shared: Path
    params: Presize


class Presizer:
    """Makes presized volumes with the same settings, on all cores, and reuses what the cache has."""

    def __init__(self, params: Presize, workers: int) -> None:
        """`workers` is joblib's n_jobs: -1 for one on each core. The bytes do not depend on it."""
        self.params, self.workers = params, workers
        settings = repr((VERSION, DECODER, params.model_dump()))
        self.cache = cache_dir("presize") / _hash(settings)
        self.cache.mkdir(exist_ok=True)
        # runs in other working folders share the cache, and may write the same volume at the same time
        self._writing = FileLock(cache_dir("locks") / "presize.lock")
        self._known: pd.DataFrame | None = None

    def volumes(
        self, raw: Path, wanted: pd.DataFrame, folder: Path, advance: Callable[[int], None]
    ) -> Iterator[PresizedVolume]:
        """Presize the images that `wanted` lists, a part of the index of `raw`, into volumes of the same names in `folder`.

        Raises:
            BreedlineError: there is a cluster, and it does not answer, or makes other bytes.
        """
        parts = [(str(shard), rows[SEEN_BY_WORKERS]) for shard, rows in wanted.groupby("shard", sort=True)]
        work = [_Work(raw.resolve() / shard, rows, self.cache, self.params) for shard, rows in parts]
        cached = each(_in_the_cache, work, "presize") if is_set() else itertools.repeat(None)
        for there, (shard, rows) in zip(cached, parts, strict=False):
            made = self.volume(raw / shard, rows, folder / shard, advance)
            yield made if there is None else made._replace(cached=there)

    def volume(self, raw: Path, rows: pd.DataFrame, target: Path, advance: Callable[[int], None]) -> PresizedVolume:
        """Presize those images of the volume `raw` that `rows` lists (name, offset, size, sha256) into `target`."""
        key = _hash("\n".join(itertools.chain(rows["name"], rows["sha256"])))
        volume, part = self.cache / f"{key}.tar", self.cache / f"{key}.csv"
        known = _table_for(rows, volume, part)
        if known is not None:
            link_or_copy(volume, target)
            os.utime(
                part
            )  # marks both as used; the volume may be linked to a working folder, where DVC would hash it anew
            advance(len(rows))
            return PresizedVolume(known.assign(shard=target.name), len(rows))
        table, cached = self._make(raw, rows, target, advance)
        target.chmod(0o444)  # it may share its bytes with the cache
        with self._writing:
            with new_file(volume) as temporary:
                link_or_copy(target, temporary)
            write_csv(table, part)
        return PresizedVolume(table, cached)

    def prune(self) -> None:
        """Remove volumes that no run has used for `UNUSED_DAYS` (the age of their table), and what killed runs left behind."""
        oldest = time.time() - UNUSED_DAYS * 86400
        with self._writing:  # so what is incomplete now was left by a killed run
            for file in self.cache.parent.glob("*/*"):
                volume, part = file.with_suffix(".tar"), file.with_suffix(".csv")
                with contextlib.suppress(FileNotFoundError):  # a cache may be deleted at any time
                    whole = file in (volume, part) and volume.is_file() and part.is_file()
                    if not whole or part.stat().st_mtime < oldest:
                        file.unlink()
        for scratch in cache_dir("scratch").iterdir():
            if scratch.stat().st_mtime < time.time() - SCRATCH_SECONDS:
                shutil.rmtree(scratch, ignore_errors=True)

    def _make(self, raw: Path, rows: pd.DataFrame, target: Path, advance: Callable[[int], None]) -> PresizedVolume:
        if self._known is None:
            self._known = self._read_cache()
        known = {row["origin"]: row for row in _records(self._known[self._known["origin"].isin(rows["sha256"])])}
        wanted = _records(rows)
        # threads: Pillow releases the GIL while it decodes, resizes and encodes. It is a hint, made here rather than in
        # __init__, so that a joblib.parallel_config around this call can put processes or a cluster in their place.
        parallel = Parallel(n_jobs=self.workers, prefer="threads", batch_size=4, return_as="generator")
        images = parallel(
            delayed(_image)(raw, row, self.cache, known.get(row["sha256"]), self.params) for row in wanted
        )
        table: list[Row] = []
        cached = 0
        with Volume(target) as volume:
            for row, (image, hit) in zip(wanted, images, strict=True):
                table.append(_add(volume, row, image))
                cached += hit
                advance(1)
        return PresizedVolume(pd.DataFrame(table, columns=PART_COLUMNS), cached)

    def _read_cache(self) -> pd.DataFrame:
        parts = sorted(self.cache.glob("*.csv"))
        tables = [table for part in parts if (table := _read_part(part.with_suffix(".tar"), part)) is not None]
        return pd.concat([pd.DataFrame(columns=PART_COLUMNS), *tables]).drop_duplicates("origin")


def _in_the_cache(work: _Work) -> int:
    """Put a presized volume into the cache, in a worker of a cluster; how many of its images were there already."""
    presizer = _presizer(work.params)
    if presizer.cache != work.shared:
        raise BreedlineError(
            f"a worker of {VARIABLE} keeps in {presizer.cache} what belongs into {work.shared}: give all machines the same "
            "environment and the same BREEDLINE_CACHE"
        )
    with parallel_config(backend="sequential"), TemporaryDirectory(dir=cache_dir("scratch")) as scratch:
        return presizer.volume(work.raw, work.rows, Path(scratch) / work.raw.name, lambda pieces: None).cached


@cache
def _presizer(params: Presize) -> Presizer:
    """One for all volumes of a worker, since it reads the tables of the whole cache."""
    return Presizer(params, 1)


def _table_for(rows: pd.DataFrame, volume: Path, part: Path) -> pd.DataFrame | None:
    """The table of a cached volume, or None if it cannot be used or has other images than `rows`."""
    table = _read_part(volume, part)
    if table is None or table["name"].tolist() != rows["name"].tolist():
        return None
    return table if table["origin"].tolist() == rows["sha256"].tolist() else None


def _read_part(volume: Path, part: Path) -> pd.DataFrame | None:
    """The table of a cached volume, or None if one of the two files is missing or damaged, or the volume is newer."""
    try:
        found = volume.stat()
        if found.st_mtime_ns > part.stat().st_mtime_ns:
            return None
        table = read_csv(part, PART_COLUMNS, INTEGERS).assign(shard=volume.name)
    except (FileNotFoundError, BreedlineError):
        return None
    right = lies_within(table, found.st_size) & (table["height"] >= 0) & (table["width"] >= 0)
    return table if right.all() else None


def _image(raw: Path, row: Row, cache: Path, known: Row | None, params: Presize) -> tuple[Presized | str, bool]:
    """The presized image, or the reason why there is none; and whether it came from the cache.

    Reading happens in the worker, so that tasks in the queue hold no image in memory.
    """
    if known and (found := _from_cache(cache, known)):
        return found, True
    if row["size"] > MAX_BYTES:
        return f"over {MAX_BYTES} bytes", False
    try:
        return presize_image(read_at(raw, row["offset"], row["size"]), params.shorter_side, params.quality), False
    except Undecodable as reason:
        return str(reason), False


def _from_cache(cache: Path, row: Row) -> Presized | str | None:
    if row["rejected"]:
        return str(row["rejected"])
    try:
        data = read_at(cache / row["shard"], row["offset"], row["size"])
    except FileNotFoundError:  # a cache may be deleted at any time
        return None
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return None  # damaged: make it again
    return Presized(data, row["height"], row["width"], row["made"])


def _add(volume: Volume, row: Row, image: Presized | str) -> Row:
    if isinstance(image, str):
        nothing = dict.fromkeys(PART_COLUMNS, "") | dict.fromkeys(INTEGERS, 0) | {"shard": volume.path.name}
        return {**nothing, "name": row["name"], "origin": row["sha256"], "rejected": image}
    entry = volume.add(row["name"], io.BytesIO(image.data), len(image.data))
    pixels = {"height": image.height, "width": image.width, "made": image.made}
    return {**entry._asdict(), **pixels, "origin": row["sha256"], "rejected": ""}


def _records(table: pd.DataFrame) -> list[Row]:
    return table.to_dict("records")  # type: ignore[return-value] # the stubs allow for columns that are no strings


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
