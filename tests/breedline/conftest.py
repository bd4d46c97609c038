"""Presized images, of which each pixel is known."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from breedline.items import Item
from breedline.shards import PRESIZED_COLUMNS, ShardSet, pack, write_index

Sizes = list[tuple[int, int]]


def _photo(number: int, width: int, height: int) -> bytes:
    """Soft shapes, as a photo has, in a format that loses nothing."""
    noise = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype="uint8")
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def presized(tmp_path: Path) -> Callable[[Sizes], tuple[ShardSet, list[Item]]]:
    """A function that makes a shard set of pictures of these (width, height), every fourth one of split `valid`."""

    def make(sizes: Sizes) -> tuple[ShardSet, list[Item]]:
        folder = tmp_path / "presized"
        folder.mkdir()
        photos = [_photo(number, *size) for number, size in enumerate(sizes)]
        files = ((f"{number}.png", len(data), io.BytesIO(data)) for number, data in enumerate(photos))
        entries = list(pack(files, folder, "00"))
        rows = [
            {**entry._asdict(), "height": height, "width": width, "made": "kept", "origin": entry.sha256}
            for entry, (width, height) in zip(entries, sizes, strict=True)
        ]
        write_index(pd.DataFrame(rows, columns=PRESIZED_COLUMNS), folder)
        items = []
        for number, (entry, (width, height)) in enumerate(zip(entries, sizes, strict=True)):
            split, label = "valid" if number % 4 == 3 else "train", "ab"[number % 2]
            place = (entry.shard, entry.offset, entry.size)
            items.append(Item(entry.name, label, split, entry.sha256, *place, height, width))
        return ShardSet(folder, PRESIZED_COLUMNS), items

    return make
