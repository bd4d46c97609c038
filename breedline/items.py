"""Items: labelled images, and where their bytes lie in the presized shard set."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from PIL import Image, ImageOps

from breedline.errors import BreedlineError
from breedline.images import Undecodable, presize_image
from breedline.shards import ShardSet

QUALITY = 95
"""JPEG quality of a photo that has to be encoded anew: the best, as it is not kept."""


@dataclass(frozen=True)
class Item:
    """A labelled, presized image: `size` bytes at `offset` of the volume `shard`, (height, width) in pixels."""

    name: str
    label: str
    split: str
    sha256: str = field(repr=False)
    shard: str = field(repr=False)
    offset: int = field(repr=False)
    size: int = field(repr=False)
    height: int = field(repr=False)
    width: int = field(repr=False)


class Photo(NamedTuple):
    """An image that is not in the presized set, presized as those are: a JPEG, (height, width) in pixels."""

    data: bytes
    height: int
    width: int


def photo(source: Path | str | Image.Image, shorter_side: int) -> Photo:
    """An image file, or an image in memory, presized.

    Raises:
        BreedlineError: it is damaged or of no supported format.
    """
    try:
        data = _bytes_of(source) if isinstance(source, Image.Image) else Path(source).read_bytes()
        return Photo(*presize_image(data, shorter_side, QUALITY)[:3])
    except Undecodable as reason:
        raise BreedlineError(f"{source} cannot be used ({reason}): save it anew as JPEG or PNG") from reason


def _bytes_of(image: Image.Image) -> bytes:
    """The image as a file that loses nothing; upright, since only some formats would keep the note of its orientation."""
    buffer = io.BytesIO()
    ImageOps.exif_transpose(image).save(buffer, "TIFF")
    return buffer.getvalue()


def load_items(images: ShardSet, labels: pd.DataFrame) -> list[Item]:
    """The rows of `labels` (name, label, split, sha256), in their order, whose image is in the presized set."""
    where = images.index.drop_duplicates("origin").set_index("origin")[["shard", "offset", "size", "height", "width"]]
    table = labels[["name", "label", "split", "sha256"]].join(where, on="sha256", how="inner")
    return [Item(*row) for row in table.itertuples(index=False)]
