"""Find labels that look wrong, before or beside training: by a frozen pretrained body, which has not learnt them."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from breedline.alike import Gallery, confirmed
from breedline.checkpoints import Checkpoints
from breedline.device import pick_device
from breedline.edge import run
from breedline.errors import BreedlineError
from breedline.features import Body, Extractor
from breedline.files import sha256_of
from breedline.inference import in_batches, infer
from breedline.items import Item, load_items
from breedline.params import Suspects
from breedline.pixels import Store
from breedline.pretrained import NOTE
from breedline.progress import progress
from breedline.shards import INDEX, PRESIZED_COLUMNS, ShardSet
from breedline.split import SPLITS
from breedline.suspects import judge, out_of_sample
from breedline.tables import read_csv, write_csv, write_json
from breedline.views import Geometry, normalised
from breedline.zoo import load_pretrained, statistics

log = logging.getLogger("breedline")
SIDE = 8
"""Pixels of the small square that is compared beside the features, or without pretrained weights alone."""
SHOWN = 3
"""The nearest images of a class that are named beside a suspect."""
NUMBERS, DIGITS = ["label_probability", "suggested_probability", "score"], 6
"""Columns of the table of suspects, and how many digits of them are written."""


def suspects(
    params: Suspects,
    presized: Path,
    labels: Path,
    weights: Path,
    arch: str,
    image_size: int,
    item_size: int,
    *,
    suspects: Path,
    near_duplicates: Path,
    metrics: Path,
) -> None:
    """List the images of all splits whose label the other images contradict, and near-duplicates that contradict each other.

    Each label's probability comes from images of other content only. One image stands for all of equal content.

    Args:
        arch: the architecture that train names (train.arch).
        image_size: pixels of the square that the model sees (train.image_size).
        item_size: pixels of the square that is cropped from each presized image (presize.shorter_side).
        suspects: table of the least credible labels, the worst first; `like_label` and `like_suggested` are the content
            hashes of the most similar images with the given and with the suggested label.
        near_duplicates: table of pairs that look the same, with different labels or in different splits.
        metrics: how many there are, tables cut off or not.

    Raises:
        BreedlineError: no images, or weights that do not fit the architecture.
    """
    images = ShardSet(presized, PRESIZED_COLUMNS)
    named = load_items(images, read_csv(labels, ["name", "label", "split", "sha256"]))
    if not named:
        raise BreedlineError(f"{labels} names no image of {presized}: `dvc repro` makes both to fit")
    items = list({item.sha256: item for item in reversed(named)}.values())[::-1]
    classes, target = np.unique([item.label for item in items], return_inverse=True)
    geometry = Geometry(item_size, image_size, *statistics(arch))
    inputs = {"weights": sha256_of(weights / NOTE), "presized": sha256_of(presized / INDEX)}
    hashes = [item.sha256 for item in items]
    checkpoints = Checkpoints(
        {"stage": "suspects", "arch": arch, "geometry": asdict(geometry), "images": hashes, **inputs}
    )
    views = seen(items, presized, arch, weights, geometry, params.batch_size, checkpoints)
    found = judge(out_of_sample(views, target, len(classes), hashes), target)
    gallery = Gallery(views[0], pick_device())
    kinds = np.unique([f"{item.split} {item.label}" for item in items], return_inverse=True)[1]
    pairs = confirmed(
        gallery.similar(kinds), lambda row: images.read(items[row].shard, items[row].offset, items[row].size)
    )
    write_csv(_suspects(found.head(params.most), items, classes, target, gallery), suspects)
    write_csv(_near_duplicates(pairs[: params.most], items), near_duplicates)
    numbers = _counts(items, found, pairs)
    write_json(numbers, metrics)
    checkpoints.made(suspects)
    log.info(
        "suspects: %d of %d labels are likely wrong (`breedline review` shows them); %d pairs of near-duplicates differ in label, %d in split",
        *(numbers["likely"], numbers["images"], *numbers["near_duplicates"].values()),
    )


def seen(
    items: list[Item],
    presized: Path,
    arch: str,
    weights: Path,
    geometry: Geometry,
    batch_size: int,
    checkpoints: Checkpoints,
) -> list[np.ndarray]:
    """The views of the items, each (images, numbers): the features of the pretrained body, if there is one, and few pixels."""
    device = pick_device()
    store = Store(ShardSet(presized, PRESIZED_COLUMNS), device, geometry.max_side)
    with progress("suspects (pixels, images)", len(items)) as advance:
        pixels = infer(
            lambda inputs: torch.nn.functional.adaptive_avg_pool2d(inputs, SIDE).flatten(1),
            store.squares(in_batches(items, batch_size), geometry.size),
            lambda batch: [normalised(batch, geometry)],
            device=device,
            advance=advance,
        )
    few = (pixels[0] - pixels[0].mean(dim=0)).cpu().numpy()
    model = load_pretrained(arch, 1, weights)
    if model is None:
        return [few]
    body = Body(arch, 1, weights.resolve(), presized.resolve(), geometry, "fp32", channels_last=True)
    extractor = Extractor(body, model.eval().to(device).to(memory_format=torch.channels_last), store)
    return [extractor.central(items, batch_size, checkpoints, "suspects")[0].numpy(), few]


def _suspects(
    found: pd.DataFrame, items: list[Item], classes: np.ndarray, target: np.ndarray, gallery: Gallery
) -> pd.DataFrame:
    """The table of suspects, from what `judge` has found."""
    rows = found["row"].to_numpy(np.int64)
    shown = [items[row] for row in rows]
    table = pd.DataFrame(
        {
            "name": [item.name for item in shown],
            "sha256": [item.sha256 for item in shown],
            "split": [item.split for item in shown],
            "label": [item.label for item in shown],
            "suggested": classes[found["suggested"].to_numpy(np.int64)],
            **{name: found[name].to_numpy(float).round(DIGITS) for name in NUMBERS},
            "likely": found["likely"].to_numpy(bool),
        }
    )
    for name in ("label", "suggested"):
        alike = gallery.nearest(rows, target, found[name].to_numpy(np.int64), SHOWN)
        table[f"like_{name}"] = [" ".join(items[row].sha256 for row in some) for some in alike]
    return table


def _near_duplicates(pairs: list[tuple[int, int, float]], items: list[Item]) -> pd.DataFrame:
    columns: dict[str, list[str] | list[float]] = {}
    for prefix, place in (("", 0), ("other_", 1)):
        of_pairs = [items[(one, other)[place]] for one, other, _ in pairs]
        columns |= {
            f"{prefix}{name}": [getattr(item, name) for item in of_pairs]
            for name in ("name", "sha256", "split", "label")
        }
    return pd.DataFrame({**columns, "similarity": [round(similarity, DIGITS) for *_, similarity in pairs]})


def _counts(items: list[Item], found: pd.DataFrame, pairs: list[tuple[int, int, float]]) -> dict[str, Any]:
    likely = [items[row].split for row in found.loc[found["likely"].astype(bool), "row"]]
    return {
        "images": len(items),
        "likely": len(likely),
        **{split: {"likely": likely.count(split)} for split in SPLITS},
        "near_duplicates": {
            "other_label": sum(items[one].label != items[other].label for one, other, _ in pairs),
            "other_split": sum(items[one].split != items[other].split for one, other, _ in pairs),
        },
    }


if __name__ == "__main__":
    run(suspects)
