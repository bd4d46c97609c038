"""Decode and reduce every labelled image once, for every later run."""

import logging
import statistics
import warnings
from pathlib import Path

import pandas as pd

from breedline.edge import run
from breedline.errors import BreedlineError
from breedline.files import new_folder
from breedline.images import shorter_side
from breedline.params import Presize
from breedline.presized import Presizer
from breedline.progress import progress
from breedline.shards import PRESIZED_COLUMNS, ShardSet, write_index
from breedline.tables import read_csv, write_csv

log = logging.getLogger("breedline")
SAMPLE = 200
"""Images that are looked at before the work begins."""
HEAD_BYTES = 2**20
"""Of each of them: the header of nearly any file is within the first MiB."""
MANY_TIMES, ENOUGH = 4, 224
"""A shorter side that is reduced to less than a quarter is worth a warning, but not to what pretrained models see."""


def presize(params: Presize, raw: Path, labels: Path, *, presized: Path, workers: int = -1) -> None:
    """Make the shard set `presized` of the labelled images of `raw`: upright RGB JPEGs, reduced, never enlarged.

    What became of each image stands in its index (`made`); what could not be decoded, and why, in `rejected.csv`.

    Args:
        workers: how many images at a time, -1 for one on each core. The result is the same.

    Raises:
        BreedlineError: not one image could be decoded, or the labels are not about `raw`.
    """
    images = ShardSet(raw)
    wanted = images.index.merge(read_csv(labels, ["name", "sha256"])[["name", "sha256"]].drop_duplicates())
    if wanted.empty:
        raise BreedlineError(f"{labels} names no image of {raw}: `dvc repro` makes both to fit")
    presizer = Presizer(params, workers)
    with new_folder(presized) as folder, progress("presize", len(wanted)) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of oddities in files that it goes on to read
        _warn_of_loss(images, wanted, params)
        volumes = [
            presizer.volume(raw / str(shard), rows, folder / str(shard), advance)
            for shard, rows in wanted.groupby("shard", sort=True)
        ]
        table = pd.concat([volume.table for volume in volumes])
        rejected = table["rejected"] != ""
        if rejected.all():
            raise BreedlineError(
                f"no image could be decoded; the first: {table['name'].iloc[0]}: {table['rejected'].iloc[0]}"
            )
        rejects = table.loc[rejected, ["name", "origin", "rejected"]]
        write_csv(rejects.set_axis(["name", "sha256", "reason"], axis=1), folder / "rejected.csv")
        write_index(table.loc[~rejected, PRESIZED_COLUMNS], folder)
    presizer.prune()
    counts = ", ".join(f"{count} {how}" for how, count in table.loc[~rejected, "made"].value_counts().items())
    log.info(
        "presize: %d images: %s, %d rejected; %d of them from the cache",
        *(len(table), counts, rejected.sum(), sum(volume.cached for volume in volumes)),
    )


def _warn_of_loss(images: ShardSet, wanted: pd.DataFrame, params: Presize) -> None:
    """Say so if next to nothing is kept of most images, as it happens to photos under the settings of another data set.

    The headers of a sample tell, so that it costs nothing, and is said when all comes from the cache, too.
    """
    sample = wanted.iloc[:: -(-len(wanted) // SAMPLE)]
    heads = (
        images.read(shard, offset, min(size, HEAD_BYTES))
        for shard, offset, size in zip(sample["shard"], sample["offset"], sample["size"], strict=True)
    )
    sides = [side for head in heads if (side := shorter_side(head))]
    median = statistics.median_low(sides) if sides else 0
    if params.shorter_side < ENOUGH and median > MANY_TIMES * params.shorter_side:
        log.warning(
            "presize: half of the images have a shorter side of %d pixels or more, of which presize.shorter_side leaves %d: "
            "raise it for photos (presets/photos.yaml)",
            *(median, params.shorter_side),
        )


if __name__ == "__main__":
    run(presize)
