"""Items: labelled images, and where their bytes lie in the presized shard set."""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from breedline.shards import PRESIZED_COLUMNS, ShardSet


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


def load_items(presized: Path, labels: pd.DataFrame) -> list[Item]:
    """The rows of `labels` (name, label, split, sha256), in their order, whose image could be decoded."""
    index = ShardSet(presized, PRESIZED_COLUMNS).index.drop_duplicates("origin")
    where = index.set_index("origin")[["shard", "offset", "size", "height", "width"]]
    table = labels[["name", "label", "split", "sha256"]].join(where, on="sha256", how="inner")
    return [Item(*row) for row in table.itertuples(index=False)]
