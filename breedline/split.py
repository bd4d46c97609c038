"""The split: train, valid or test, decided by each image's content alone.

A keyed hash of the content gives every image a fixed number in [0, 1), so adding images never moves an old one, and
exact duplicates fall on one side. Only in a class too small for its share does the lowest hash step in, which a
later, lower one may relieve.
"""

import hashlib

import pandas as pd

SPLITS = ("train", "valid", "test")


def draw(sha256: str, seed: int) -> float:
    """The number in [0, 1) that decides the split of the image with this content."""
    digest = hashlib.blake2b(sha256.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign(table: pd.DataFrame, *, valid_pct: float, test_pct: float, seed: int, test: set[str]) -> pd.Series:
    """The split of each row of `table` (columns sha256, label; one label for each sha256).

    Args:
        valid_pct, test_pct: shares of the whole, 0 to 1. A share of 0 leaves that split empty.
        test: content hashes of a fixed test split; where given, nothing else joins it and `test_pct` is ignored.
    """
    images = table.drop_duplicates("sha256").set_index("sha256")
    number = pd.Series([draw(sha256, seed) for sha256 in images.index], index=images.index)
    split = pd.Series("train", index=images.index)
    if test:
        split[images.index.isin(test)] = "test"
        split[(split == "train") & (number < valid_pct)] = "valid"
    else:
        split[number < test_pct + valid_pct] = "valid"
        split[number < test_pct] = "test"
    for _, members in number.groupby(images["label"]):
        if test_pct and not test:
            _fill(split, members, "test")
        if valid_pct:
            _fill(split, members, "valid")
    return table["sha256"].map(split)


def _fill(split: pd.Series, members: pd.Series, name: str) -> None:
    """Give the class its lowest hash in split `name` if it has none there, as long as one is left to train on."""
    mine = split[members.index]
    train = members[mine == "train"]
    if not (mine == name).any() and len(train) > 1:
        split[split.index == train.idxmin()] = name
