"""The split: train, valid or test, decided by each image's content alone.

A keyed hash of the content gives every image a fixed number in [0, 1), so adding images never moves an old one, and
exact duplicates are in the same split. If a class has no image in `valid` or `test`, its image with the lowest number goes
there, until an image with a lower number is added.
"""

import hashlib

import numpy as np
import pandas as pd

SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)


def draw(sha256: str, seed: int) -> float:
    """A number in [0, 1) that depends only on an image's content and the seed: a BLAKE2b hash keyed by the seed."""
    digest = hashlib.blake2b(sha256.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign(table: pd.DataFrame, *, valid_pct: float, test_pct: float, seed: int, test: set[str]) -> pd.Series:
    """The split of each row of `table` (columns sha256, label; one label for each sha256).

    Args:
        valid_pct, test_pct: shares of the whole, 0 to 1. A share of 0 leaves that split empty.
        test: content hashes of a fixed test split. If there are any, it has no other image, and `test_pct` is ignored.
    """
    content, sha256 = pd.factorize(table["sha256"])  # row i of the table has the content sha256[content[i]]
    labels = table["label"][~table["sha256"].duplicated()]  # (contents,), in the order of sha256
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
    """Move the image with the lowest number of a class to split `needed`, if that has none and one is left to train on.

    Args:
        split: (contents,) the number of each content's split in SPLITS; changed in place.
        members: (contents of the class,) their indices into `split` and `number`.
        number: (contents,) what `draw` gave, in [0, 1).
    """
    train = members[split[members] == TRAIN]
    if not (split[members] == needed).any() and len(train) > 1:
        split[train[number[train].argmin()]] = needed
