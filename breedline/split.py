"""The split: train, valid or test, decided by each image's content alone.

A keyed hash of the content gives every image a fixed number in [0, 1), so adding images never moves an old one, and
exact duplicates are in the same split. Near-duplicates form groups (duplicates.py), which are never divided: all have the
number of their leader, the first of them. If a class has no image in `valid` or `test`, its group with the lowest number
goes there, until a group with a lower number is added; if it has none in `train`, the one with the highest. A group that
has images of several classes stays where it is.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
import pandas as pd

SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)


def draw(sha256: str, seed: int) -> float:
    """A number in [0, 1) that depends only on an image's content and the seed: a BLAKE2b hash keyed by the seed."""
    digest = hashlib.blake2b(sha256.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def assign(
    table: pd.DataFrame, *, valid_pct: float, test_pct: float, seed: int, test: set[str], leaders: Mapping[str, str]
) -> pd.Series:
    """The split of each row of `table` (columns sha256, label; one label for each sha256).

    Args:
        valid_pct, test_pct: shares of the whole, 0 to 1. A share of 0 leaves that split empty.
        test: content hashes of a fixed test split. If there are any, it has no other image, not even their
            near-duplicates, and `test_pct` is ignored.
        leaders: content hash -> that of the leader of its group. The others are groups by themselves.
    """
    content, sha256 = pd.factorize(table["sha256"])  # row i of the table has the content sha256[content[i]]
    labels = table["label"][~table["sha256"].duplicated()].to_numpy()  # (contents,), in the order of sha256
    drawn = np.fromiter((draw(leaders.get(image, image), seed) for image in sha256), np.float64, len(sha256))
    group, number = pd.factorize(drawn)  # 53 bits: as good as the leaders themselves, and a tenth of their memory
    split = np.full(len(number), TRAIN, np.int8)  # of each group
    if test:
        split[number < valid_pct] = VALID
    else:
        split[number < test_pct + valid_pct] = VALID
        split[number < test_pct] = TEST
    listed = sha256.isin(test)
    of_class = pd.DataFrame({"group": group, "label": labels})[~listed].drop_duplicates()
    of_class["pure"] = ~of_class["group"].duplicated(keep=False)  # has no other class
    asked = [TEST] * bool(test_pct and not test) + [VALID] * bool(valid_pct)
    for _, members in of_class.iloc[number[of_class["group"]].argsort()].groupby("label"):
        groups, pure = members["group"].to_numpy(), members["pure"].to_numpy()  # by rising number
        if not (split[groups] == TRAIN).any():
            split[groups[pure][-1:]] = TRAIN
        for needed in asked:
            train = split[groups] == TRAIN
            if train.sum() > 1 and not (split[groups] == needed).any():
                split[groups[train & pure][:1]] = needed
    of_content = split[group]
    of_content[listed] = TEST
    return pd.Series(np.array(SPLITS, dtype=object)[of_content][content], index=table.index, dtype="str")
