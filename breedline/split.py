"""The split: train, valid or test, decided by each image's content alone.

A keyed hash of the content gives every image a fixed number in [0, 1), so adding images never moves an old one, and
exact duplicates fall on one side. Only in a class too small for its share does the lowest hash step in, which a
later, lower one may relieve.
"""

import hashlib

import numpy as np
import pandas as pd

SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)


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
    content, sha256 = pd.factorize(table["sha256"])  # sha256[content[row]] is the row's
    labels = table["label"][~table["sha256"].duplicated()]  # as sha256, each image once, in the same order
    number = np.fromiter((draw(image, seed) for image in sha256), np.float64, len(sha256))
    split = np.full(len(sha256), TRAIN, np.int8)
    if test:
        split[sha256.isin(test)] = TEST
        split[(split == TRAIN) & (number < valid_pct)] = VALID
    else:
        split[number < test_pct + valid_pct] = VALID
        split[number < test_pct] = TEST
    for members in map(np.asarray, labels.groupby(labels.to_numpy()).indices.values()):
        if test_pct and not test:
            _fill(split, TEST, members, number)
        if valid_pct:
            _fill(split, VALID, members, number)
    return pd.Series(np.array(SPLITS, dtype=object)[split][content], index=table.index, dtype="str")


def _fill(split: np.ndarray, needed: int, members: np.ndarray, number: np.ndarray) -> None:
    """Give a class its lowest number in split `needed` if it has none there, as long as one is left to train on.

    Args:
        split: of each image, (images,), as a place in SPLITS; changed in place.
        members: the class's images, as places in `split` and `number`.
        number: of each image, (images,), in [0, 1).
    """
    train = members[split[members] == TRAIN]
    if not (split[members] == needed).any() and len(train) > 1:
        split[train[number[train].argmin()]] = needed
