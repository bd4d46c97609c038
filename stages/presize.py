"""Decode and reduce every labelled image once, for all later runs."""

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
"""Images whose headers tell how large the raw images are."""
HEAD_BYTES = 2**20
"""Bytes read of each: nearly every format has the size in the first MiB."""
MUCH_LARGER, ENOUGH = 4, 224
"""Warn if the raw images are more than so many times as large, unless enough pixels for a pretrained model are kept."""


def presize(params: Presize, raw: Path, labels: Path, *, presized: Path, workers: int = -1) -> None:
    """Make the shard set `presized` of the labelled images of `raw`: upright RGB JPEGs, reduced, never enlarged.

    The column `made` of its index says how each image came about; `rejected.csv` lists those that could not be decoded,
    with the reason.

    Args:
        workers: how many images are decoded at the same time, -1 for one on each core. The result does not depend on it.

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
        volumes = list(presizer.volumes(raw, wanted, folder, advance))
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
    """Warn if presize.shorter_side is tiny for these images, as with photos and the settings of another data set.

    Only headers are read, so that it costs next to nothing, and the warning appears when all images are cached, too.
    """
    if params.shorter_side >= ENOUGH:
        return
    sample = wanted.iloc[:: -(-len(wanted) // SAMPLE)]
    heads = (
        images.read(shard, offset, min(size, HEAD_BYTES))
        for shard, offset, size in zip(sample["shard"], sample["offset"], sample["size"], strict=True)
    )
    sides = [side for head in heads if (side := shorter_side(head))]
    median = statistics.median_low(sides) if sides else 0
    if median > MUCH_LARGER * params.shorter_side:
        log.warning(
            "presize: half of the images have a shorter side of %d pixels or more, reduced to presize.shorter_side = %d: "
            "raise it for photos, as in presets/photos.yaml",
            *(median, params.shorter_side),
        )


if __name__ == "__main__":
    run(presize)
