"""Near-duplicates: copies of a photo that were encoded, reduced, cropped a little, brightened or made grey anew.

A split by content alone puts them on both sides, and a model is then measured on what it was trained on. Here they form
groups, each called after its *leader*, the first of them in the order of the raw index:

- An image joins the first leader that it is a near-duplicate of; where there is none, it becomes a leader itself.
- So images that come after (a new source is a new entry at the end) change no earlier group, and groups never merge. One
  that resembles two groups joins the earlier, and the two stay as they are.
- Members resemble their leader, not necessarily each other, so a long series of similar images makes no endless chain.

Two images are near-duplicates if their perceptual hashes differ in at most MAX_DISTANCE bits of 64, and their grey values
at SIDE x SIDE pixels have a correlation of at least `duplicates.similarity`. The hash (pHash: the signs of the lowest
frequencies of a discrete cosine transform) is quick to compare, the grey values are what decides. A mirrored image, and
one that was cropped by a tenth, is another image. An image without detail (a white page) resembles all such, and is none's
near-duplicate. Only pixels count, no pretrained model: a split may not move because the model does.

Each image is compared with every leader, 64 bits at a time: seconds of a processor for 100,000 images and, as the square,
ten minutes for a million, less than it takes to decode them.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pandas as pd
from imagehash import phash
from PIL import Image

from breedline.files import cache_dir
from breedline.params import Presize
from breedline.presized import Presizer
from breedline.shards import read_at

REDUCED = Presize(shorter_side=64, quality=95)
"""How images are reduced before they are compared."""
SIDE = 16
MAX_DISTANCE = 12
"""Bits. Of 370 photos cropped by 5 %, 370 are found; no two of the photos themselves are nearer than 14."""
MAX_CANDIDATES = 256
"""Leaders of similar hash that an image is compared with, the first of them: bounds the time where all hashes are alike."""
FLAT = 16
"""An image whose brightest and darkest grey values differ by less, of 255, has no detail to compare."""


class Sketch(NamedTuple):
    """What is compared of an image: its hash of 64 bits, and its SIDE * SIDE grey values as bytes."""

    hash: int
    thumbnail: bytes


def sketch(picture: Image.Image) -> Sketch | None:
    """The sketch of an upright picture, or None if it has no detail."""
    grey = picture.convert("L")
    thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    if np.ptp(thumbnail) < FLAT:
        return None
    return Sketch(int.from_bytes(np.packbits(phash(grey).hash).tobytes(), "big"), thumbnail.tobytes())


def sketches(raw: Path, wanted: pd.DataFrame, advance: Callable[[int], None]) -> Iterator[tuple[str, Sketch]]:
    """The content hash and the sketch of each image in `wanted`, a part of the index of `raw`, that has one; in any order.

    They are reduced as presize reduces them, so that no file can do harm, each content is decoded once on a machine, and a
    cluster may do it. What cannot be decoded has no sketch; the presize stage says why.
    """
    with TemporaryDirectory(dir=cache_dir("scratch")) as scratch:
        for volume in Presizer(REDUCED, workers=-1).volumes(raw, wanted, Path(scratch), advance):
            images = volume.table[volume.table["rejected"] == ""]
            for row in images.itertuples(index=False):
                data = read_at(Path(scratch) / str(row.shard), int(row.offset), int(row.size))  # type: ignore[arg-type]
                if found := sketch(Image.open(io.BytesIO(data), formats=("JPEG",))):
                    yield str(row.origin), found
            (Path(scratch) / str(volume.table["shard"].iloc[0])).unlink()


def leaders(images: Sequence[Sketch], similarity: float) -> np.ndarray:
    """The index of each image's leader in `images`, (images,); a leader's is its own.

    The first n indices depend on the first n images alone.
    """
    thumbnails = np.frombuffer(b"".join(image.thumbnail for image in images), np.uint8).reshape(-1, SIDE * SIDE)
    found = np.arange(len(images))
    hashes, numbers, count = np.empty(len(images), np.uint64), np.empty(len(images), np.intp), 0  # of the leaders
    for number, image in enumerate(images):
        distance = np.bitwise_count(hashes[:count] ^ np.uint64(image.hash))
        near = numbers[np.flatnonzero(distance <= MAX_DISTANCE)[:MAX_CANDIDATES]]
        alike = near[_correlation(thumbnails[near], thumbnails[number]) >= similarity]
        if len(alike):
            found[number] = alike[0]
        else:
            hashes[count], numbers[count] = image.hash, number
            count += 1
    return found


def _correlation(many: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each row of `many`, (n, pixels), with `one`, (pixels,); both uint8, none of them flat.

    It is computed of whole numbers, so that it is the same on every machine: n Σxy - Σx Σy over the roots of the same of x
    with itself and of y with itself.
    """
    x, y = many.astype(np.int64), one.astype(np.int64)
    pixels, sum_x, sum_y = len(y), x.sum(axis=1), y.sum()
    covariance = pixels * (x @ y) - sum_x * sum_y
    spread_x = pixels * (x * x).sum(axis=1) - sum_x * sum_x
    spread_y = pixels * (y @ y) - sum_y * sum_y
    return covariance / (np.sqrt(spread_x) * np.sqrt(spread_y))
