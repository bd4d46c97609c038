"""The presized shard set, and the per-machine cache that makes it cheap to make again.

Each raw volume gives one presized volume. The cache keeps presized volumes beside a table of what they hold, under
the hash of everything that decides their bytes: a volume whose images are all as before is linked, not made; in a
new volume, an image that any cached one holds is copied; only the rest is decoded. Since a finished volume goes to
the cache at once, a killed run loses at most the volume it was at.
"""

import hashlib
import io
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from joblib import Parallel, delayed

from breedline.files import cache_dir, link_or_copy, new_file, read_csv, write_csv
from breedline.images import DECODER, VERSION, Presized, Undecodable, presize_image
from breedline.params import Presize
from breedline.shards import PRESIZED_COLUMNS, Volume, read_at

PART_COLUMNS = [*PRESIZED_COLUMNS, "rejected"]
"""A cached table has the rejects too: size 0, and the reason."""
INTEGERS = ["offset", "size", "height", "width"]
Row = dict[str, Any]
IMAGES_AT_A_TIME = 128
UNUSED_DAYS = 30


class Made(NamedTuple):
    """The table of one presized volume (PART_COLUMNS), and how many of its images the cache gave."""

    table: pd.DataFrame
    cached: int


class Presizer:
    """Makes presized volumes for one setting, on all cores, with the help of the cache."""

    def __init__(self, params: Presize, workers: int) -> None:
        """`workers` as joblib counts: -1 for every core. The bytes do not depend on it."""
        self.params = params
        # threads: Pillow decodes, resizes and encodes without the interpreter's lock, and nothing has to be started;
        # a hint only, so that joblib.parallel_config can put Dask or Ray in their place
        self.parallel = Parallel(n_jobs=workers, prefer="threads", batch_size=4)
        settings = repr((VERSION, DECODER, params.model_dump()))
        self.cache = cache_dir("presize") / _hash(settings)
        self.cache.mkdir(exist_ok=True)
        self._known: dict[str, Row] | None = None

    def volume(self, raw: Path, rows: pd.DataFrame, target: Path, advance: Callable[[int], None]) -> Made:
        """Presize the images of the volume `raw` that `rows` names (name, offset, size, sha256) into `target`."""
        key = _hash("\n".join(itertools.chain(rows["name"], rows["sha256"])))
        volume, part = self.cache / f"{key}.tar", self.cache / f"{key}.csv"
        if part.is_file() and volume.is_file():
            table = read_csv(part, PART_COLUMNS, INTEGERS)
            if volume.stat().st_size >= (table["offset"] + table["size"]).max():
                link_or_copy(volume, target)
                for file in (volume, part):
                    os.utime(file)
                advance(len(rows))
                return Made(table.assign(shard=target.name), len(rows))
        table, cached = self._make(raw, rows, target, advance)
        target.chmod(0o444)  # it may share its bytes with the cache
        with new_file(volume) as temporary:
            link_or_copy(target, temporary)
        write_csv(table, part)
        return Made(table, cached)

    def prune(self) -> None:
        """Forget what no run has used for `UNUSED_DAYS`."""
        oldest = time.time() - UNUSED_DAYS * 86400
        for file in self.cache.parent.glob("*/*"):
            if file.stat().st_mtime < oldest:
                file.unlink(missing_ok=True)

    def _make(self, raw: Path, rows: pd.DataFrame, target: Path, advance: Callable[[int], None]) -> Made:
        if self._known is None:
            self._known = dict(self._read_cache())
        made: list[Row] = []
        cached = 0
        with Volume(target) as volume, self.parallel as parallel:
            for chunk in _chunks(_records(rows), IMAGES_AT_A_TIME):
                found = [self._from_cache(row["sha256"]) for row in chunk]
                missing = [row for row, hit in zip(chunk, found, strict=True) if hit is None]
                tasks = (
                    delayed(_presize_at)(raw, row["offset"], row["size"], self.params.size, self.params.quality)
                    for row in missing
                )
                fresh = iter(parallel(tasks))
                cached += len(chunk) - len(missing)
                for row, hit in zip(chunk, found, strict=True):
                    made.append(_add(volume, row, next(fresh) if hit is None else hit))
                advance(len(chunk))
        return Made(pd.DataFrame(made, columns=PART_COLUMNS), cached)

    def _read_cache(self) -> Iterator[tuple[str, Row]]:
        for part in sorted(self.cache.glob("*.csv")):
            volume = part.with_suffix(".tar")
            if volume.is_file():
                for row in _records(read_csv(part, PART_COLUMNS, INTEGERS)):
                    yield row["origin"], row | {"volume": volume}

    def _from_cache(self, origin: str) -> Presized | str | None:
        row = (self._known or {}).get(origin)
        if row is None:
            return None
        if row["rejected"]:
            return str(row["rejected"])
        data = read_at(row["volume"], row["offset"], row["size"])
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            return None  # damaged in the cache: make it again
        return Presized(data, row["height"], row["width"], row["made"])


def _presize_at(raw: Path, offset: int, size: int, pixels: int, quality: int) -> Presized | str:
    """The presized image, or why there is none. Reads in the worker, so that waiting tasks hold no image."""
    try:
        return presize_image(read_at(raw, offset, size), pixels, quality)
    except Undecodable as reason:
        return str(reason)


def _add(volume: Volume, row: Row, image: Presized | str) -> Row:
    if isinstance(image, str):
        nothing = dict.fromkeys(PART_COLUMNS, "") | dict.fromkeys(INTEGERS, 0)
        return {**nothing, "name": row["name"], "origin": row["sha256"], "rejected": image}
    entry = volume.add(row["name"], io.BytesIO(image.data), len(image.data))
    made = {"height": image.height, "width": image.width, "made": image.made, "origin": row["sha256"], "rejected": ""}
    return {**entry._asdict(), **made}


def _records(table: pd.DataFrame) -> list[Row]:
    return table.to_dict("records")  # type: ignore[return-value] # the stubs allow for columns that are no strings


def _chunks(rows: list[Row], size: int) -> Iterator[list[Row]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
