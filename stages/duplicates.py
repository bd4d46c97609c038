"""Find images that are nearly the same, for the split to keep them on one side."""

import logging
import warnings
from pathlib import Path

import pandas as pd

from breedline.duplicates import leaders, sketches
from breedline.edge import run
from breedline.params import Duplicates
from breedline.progress import progress
from breedline.shards import ShardSet
from breedline.tables import write_csv

log = logging.getLogger("breedline")
COLUMNS = ["sha256", "leader"]
LARGE = 0.1
"""Warn if more than this share of all images are near-duplicates of one."""


def duplicates(params: Duplicates, raw: Path, *, duplicates: Path) -> None:
    """Group the images of `raw` that are nearly the same, each group under its first image, its leader.

    Images that come later never change the groups of the earlier ones.

    Args:
        duplicates: table of sha256, leader: a line for each content that is a near-duplicate of an earlier one. Leaders have none.
    """
    if params.similarity is None:
        write_csv(pd.DataFrame(columns=COLUMNS, dtype="str"), duplicates)
        log.info("duplicates: none are looked for, as duplicates.similarity is null")
        return
    images = ShardSet(raw).index
    wanted = images[images["format"] != ""].drop_duplicates("sha256")
    with progress("look for near-duplicates", len(wanted)) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of oddities in files that it goes on to read
        found = dict(sketches(raw, wanted, advance))
    table = wanted.loc[wanted["sha256"].isin(found.keys()), ["name", "sha256"]]  # in the order of the index
    leader = table.iloc[leaders([found[sha256] for sha256 in table["sha256"]], params.similarity)]
    table = table.assign(leader=leader["sha256"].to_numpy(), leader_name=leader["name"].to_numpy())
    table = table[table["sha256"] != table["leader"]]
    write_csv(table[COLUMNS], duplicates)

    sizes = table["leader_name"].value_counts()  # without the leaders
    log.info("duplicates: %d of %d images are near-duplicates of %d others", len(table), len(wanted), len(sizes))
    if len(sizes) and sizes.iloc[0] > LARGE * len(wanted):
        log.warning(
            "duplicates: %d images are near-duplicates of %r, and the split cannot divide them: if they are not, raise "
            "duplicates.similarity, or set it to null",
            *(sizes.iloc[0], sizes.index[0]),
        )


if __name__ == "__main__":
    run(duplicates)
