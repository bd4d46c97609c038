"""What is trained on and evaluated: labelled images, and where they lie in the presized shard set."""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from breedline.shards import PRESIZED_COLUMNS, ShardSet


@dataclass(frozen=True)
class Item:
    """One labelled, presized image: what it is, and where its bytes lie."""

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
    """The labelled images that could be decoded, in the order of `labels` (name, label, split, sha256)."""
    index = ShardSet(presized, PRESIZED_COLUMNS).index.drop_duplicates("origin")
    where = index.set_index("origin")[["shard", "offset", "size", "height", "width"]]
    table = labels[["name", "label", "split", "sha256"]].join(where, on="sha256", how="inner")
    return [Item(*row) for row in table.itertuples(index=False)]
