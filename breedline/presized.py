"""The presized shard set, and the per-machine cache that makes it cheap to make again.

Each raw volume gives one presized volume. The cache keeps presized volumes beside a table of what they hold, under
the hash of everything that decides their bytes: a volume whose images are all as before is linked, not made; in a
new volume, an image that any cached one holds is copied; only the rest is decoded. Since a finished volume goes to
the cache at once, a killed run loses at most the volume it was at.
"""

import contextlib
import hashlib
import io
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from joblib import Parallel, delayed

from breedline.errors import BreedlineError
from breedline.files import cache_dir, link_or_copy, new_file
from breedline.images import DECODER, VERSION, Presized, Undecodable, presize_image
from breedline.params import Presize
from breedline.shards import PRESIZED_COLUMNS, Volume, read_at
from breedline.tables import read_csv, write_csv

PART_COLUMNS = [*PRESIZED_COLUMNS, "rejected"]
"""A cached table has the rejects too: size 0, and the reason."""
INTEGERS = ["offset", "size", "height", "width"]
Row = dict[str, Any]
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
        # a hint only, so that joblib.parallel_config can put processes or Dask in their place
        self.parallel = Parallel(n_jobs=workers, prefer="threads", batch_size=4, return_as="generator")
        settings = repr((VERSION, DECODER, params.model_dump()))
        self.cache = cache_dir("presize") / _hash(settings)
        self.cache.mkdir(exist_ok=True)
        self._known: pd.DataFrame | None = None

    def volume(self, raw: Path, rows: pd.DataFrame, target: Path, advance: Callable[[int], None]) -> Made:
        """Presize the images of the volume `raw` that `rows` names (name, offset, size, sha256) into `target`."""
        key = _hash("\n".join(itertools.chain(rows["name"], rows["sha256"])))
        volume, part = self.cache / f"{key}.tar", self.cache / f"{key}.csv"
        whole = _whole(volume, part)
        if whole is not None:
            link_or_copy(volume, target)
            os.utime(part)  # not the volume, which other working folders may have linked, and DVC would hash anew
            advance(len(rows))
            return Made(whole.assign(shard=target.name), len(rows))
        table, cached = self._make(raw, rows, target, advance)
        target.chmod(0o444)  # it may share its bytes with the cache
        with new_file(volume) as temporary:
            link_or_copy(target, temporary)
        write_csv(table, part)
        return Made(table, cached)

    def prune(self) -> None:
        """Forget what no run has used for `UNUSED_DAYS`; a volume is used when its table is touched."""
        oldest = time.time() - UNUSED_DAYS * 86400
        for file in self.cache.parent.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another run may be writing or pruning
                part = file.with_suffix(".csv")
                if (part if part.is_file() else file).stat().st_mtime < oldest:
                    file.unlink()

    def _make(self, raw: Path, rows: pd.DataFrame, target: Path, advance: Callable[[int], None]) -> Made:
        if self._known is None:
            self._known = self._read_cache()
        known = {row["origin"]: row for row in _records(self._known[self._known["origin"].isin(rows["sha256"])])}
        wanted = _records(rows)
        images = self.parallel(
            delayed(_image)(raw, row, self.cache, known.get(row["sha256"]), self.params) for row in wanted
        )
        made: list[Row] = []
        cached = 0
        with Volume(target) as volume:
            for row, (image, hit) in zip(wanted, images, strict=True):
                made.append(_add(volume, row, image))
                cached += hit
                advance(1)
        return Made(pd.DataFrame(made, columns=PART_COLUMNS), cached)

    def _read_cache(self) -> pd.DataFrame:
        tables = [pd.DataFrame(columns=PART_COLUMNS)]
        for part in sorted(self.cache.glob("*.csv")):
            volume = part.with_suffix(".tar")
            if volume.is_file():
                with contextlib.suppress(BreedlineError):
                    tables.append(read_csv(part, PART_COLUMNS, INTEGERS).assign(shard=volume.name))
        return pd.concat(tables).drop_duplicates("origin")


def _whole(volume: Path, part: Path) -> pd.DataFrame | None:
    """The table of a cached volume, or None where one of the two is missing, cut short or changed since."""
    try:
        if volume.stat().st_mtime_ns > part.stat().st_mtime_ns:
            return None
        table = read_csv(part, PART_COLUMNS, INTEGERS)
    except (FileNotFoundError, BreedlineError):
        return None
    return table if volume.stat().st_size >= (table["offset"] + table["size"]).max() else None


def _image(raw: Path, row: Row, cache: Path, known: Row | None, params: Presize) -> tuple[Presized | str, bool]:
    """The presized image, or why there is none; and whether that was known.

    Reads in the worker, so that waiting tasks hold no image.
    """
    if known and (found := _from_cache(cache, known)):
        return found, True
    try:
        return presize_image(read_at(raw, row["offset"], row["size"]), params.shorter_side, params.quality), False
    except Undecodable as reason:
        return str(reason), False


def _from_cache(cache: Path, row: Row) -> Presized | str | None:
    if row["rejected"]:
        return str(row["rejected"])
    data = read_at(cache / row["shard"], row["offset"], row["size"])
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        return None  # damaged in the cache: make it again
    return Presized(data, row["height"], row["width"], row["made"])


def _add(volume: Volume, row: Row, image: Presized | str) -> Row:
    if isinstance(image, str):
        nothing = dict.fromkeys(PART_COLUMNS, "") | dict.fromkeys(INTEGERS, 0) | {"shard": volume.path.name}
        return {**nothing, "name": row["name"], "origin": row["sha256"], "rejected": image}
    entry = volume.add(row["name"], io.BytesIO(image.data), len(image.data))
    made = {"height": image.height, "width": image.width, "made": image.made, "origin": row["sha256"], "rejected": ""}
    return {**entry._asdict(), **made}


def _records(table: pd.DataFrame) -> list[Row]:
    return table.to_dict("records")  # type: ignore[return-value] # the stubs allow for columns that are no strings


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]
