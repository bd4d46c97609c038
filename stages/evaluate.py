"""Metrics of a trained model on images that training never saw, and what to look at next."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from breedline.checkpoints import remove_those_of
from breedline.device import pick_device, set_seed
from breedline.edge import run
from breedline.errors import BreedlineError
from breedline.files import new_folder
from breedline.inference import in_batches, infer
from breedline.items import Item, load_items
from breedline.neighbours import FILE, Neighbours, of_unit_length, thumbnail, write
from breedline.params import Evaluate
from breedline.pixels import Store
from breedline.progress import progress
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from breedline.split import draw
from breedline.tables import read_csv, write_json
from breedline.trained import WEIGHTS, TrainedSpec, load_trained, read_spec, weights
from breedline.views import normalised
from breedline.zoo import divide_logits, features, has_linear_head

log = logging.getLogger("breedline")
SEED = 0
"""Seed of the augmented views, and of the choice of training photos to show."""


def evaluate(params: Evaluate, trained: Path, presized: Path, labels: Path, *, metrics: Path, report: Path) -> None:
    """Compare the model's predictions with the labels of the splits `test` and `valid`, after calibration on the latter.

    Args:
        metrics: those of both splits, and the calibration, as nested JSON.
        report: folder for the test split's predictions, its scores per class, the pairs of classes most often confused,
            pictures of the confusion matrix and the F1 per class, a sheet of the worst mistakes, and training photos to
            compare new ones with, which stay there: the bundle has no photos.

    Raises:
        BreedlineError: no usable model, or no test images, or a label that the model does not know.
    """
    images = ShardSet(presized, PRESIZED_COLUMNS)
    spec = read_spec(trained)
    remove_those_of(trained / WEIGHTS)
    table = read_csv(labels, ["name", "label", "split", "sha256"])
    every = load_items(images, table)
    items = [item for item in every if item.split != "train"]
    splits = np.array([item.split for item in items])
    if "test" not in splits:
        raise BreedlineError("split test has no images: raise label.test_pct, or mend label.test_list")
    if unknown := sorted(set(table["label"]) - set(spec.classes)):
        raise BreedlineError(
            f"the model does not know the class {', '.join(unknown[:5])}: `dvc repro train` makes a new one"
        )
    store = Store(images, pick_device(), spec.geometry.max_side)
    squares = store.squares(in_batches(items, params.batch_size), spec.geometry.size)
    model, _ = load_trained(trained)  # while the first images are decoded
    with progress("evaluate (images)", len(items)) as advance:
        logits = predict(params, model, spec, store, items, squares, advance)
    # imported here: scikit-learn, scipy and matplotlib take as long to import as the digits to predict
    from breedline.findings import calibrated, numbers_of, write_report

    target = np.array([spec.classes.index(item.label) for item in items])
    found = calibrated(params, spec, logits, target, splits == "valid", adjustable=has_linear_head(model))
    numbers = {
        split: numbers_of(params, found, target, splits == split) for split in ("test", "valid") if split in splits
    }
    tested = [item for item in items if item.split == "test"]
    of_test = splits == "test"
    with new_folder(report) as folder:
        write_report(params, spec, images, tested, found.probabilities[of_test], target[of_test], folder)
        if params.neighbours and has_linear_head(model):
            shown = drawn([item for item in every if item.split == "train"], params.neighbours)
            write(neighbours(params, model, spec, store, shown, found.temperature), folder / FILE)
    calibration = {"temperature": found.temperature, "none_below": found.none_below}
    write_json({**numbers, "calibration": calibration}, metrics)
    log.info("evaluate: accuracy %.4f on %d test images", numbers["test"]["accuracy"], numbers["test"]["images"])


def predict(
    params: Evaluate,
    model: torch.nn.Module,
    spec: TrainedSpec,
    store: Store,
    items: list[Item],
    squares: Iterator[torch.Tensor],
    advance: Callable[[int], None] = lambda images: None,
) -> np.ndarray:
    """Logits (views, images, classes) of the items: of their central squares, then of `tta` augmented views each.

    Args:
        squares: those of the items, in batches, as `Store.squares` gives them.
    """
    model = model.to(store.device).to(memory_format=torch.channels_last)
    plain = infer(
        model, squares, lambda batch: [normalised(batch, spec.geometry)], device=store.device, advance=advance
    )
    if not params.tta:
        return plain.cpu().numpy()
    # only here is fastai needed, which takes as long to import as all else
    from breedline.augment import Transforms

    transforms = Transforms(spec.geometry, spec.augment)
    set_seed(SEED)
    batches = store.batches(in_batches(items, max(1, params.batch_size // params.tta)))
    with progress("evaluate (augmented views, images)", len(items)) as advance:
        augmented = infer(
            model,
            batches,
            lambda pixels: [transforms.finished(pixels, store.device) for _ in range(params.tta)],
            device=store.device,
            advance=advance,
        )
    return torch.cat([plain, augmented]).cpu().numpy()


def drawn(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, all different: those of the lowest numbers that their content draws, in their order."""
    different = {item.sha256: item for item in sorted(items, key=lambda item: item.name, reverse=True)}
    return sorted(different.values(), key=lambda item: draw(item.sha256, SEED))[:count]


def neighbours(
    params: Evaluate, model: torch.nn.Module, spec: TrainedSpec, store: Store, items: list[Item], temperature: float
) -> Neighbours:
    """The items as the bundle's model sees them. The logits of `model` are divided by the temperature, as the bundle's are."""
    thumbnails: list[bytes] = []

    def squares() -> Iterator[torch.Tensor]:
        for batch in store.squares(in_batches(items, params.batch_size), spec.geometry.size):
            thumbnails.extend(map(thumbnail, batch.cpu().numpy()))
            yield batch

    with progress("evaluate (training photos to show, images)", len(items)) as advance:
        (found,) = infer(
            partial(features, model),
            squares(),
            lambda batch: [normalised(batch, spec.geometry)],
            device=store.device,
            advance=advance,
        )
    divide_logits(model.cpu(), temperature)
    return Neighbours(
        model=hashlib.sha256(weights(model)).hexdigest(),
        names=[item.name for item in items],
        labels=[item.label for item in items],
        features=of_unit_length(found.cpu().numpy()),
        thumbnails=thumbnails,
    )


if __name__ == "__main__":
    run(evaluate)
