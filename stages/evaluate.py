"""Metrics of a bundle on images that training never saw, and what to look at next."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from breedline.bundle import BundleSpec, load_bundle, read_spec
from breedline.device import pick_device, set_seed
from breedline.edge import run
from breedline.errors import BreedlineError
from breedline.files import new_folder
from breedline.inference import in_batches, infer
from breedline.items import load_items
from breedline.losses import loss_function
from breedline.params import Evaluate
from breedline.pixels import Pixels, Store
from breedline.progress import progress
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from breedline.tables import read_csv, write_json
from breedline.views import central_views

log = logging.getLogger("breedline")
SEED = 0
"""Seed of the augmented views."""
PLAIN_WEIGHT = 0.25
"""Weight of the plain view in test-time augmentation; the mean of the augmented ones has the rest."""


def evaluate(params: Evaluate, bundle: Path, presized: Path, labels: Path, *, metrics: Path, report: Path) -> None:
    """Compare the bundle's predictions with the labels of the splits `test` and `valid`.

    Args:
        metrics: those of both splits, as nested JSON.
        report: folder for the test split's predictions, its scores per class, the pairs of classes most often confused,
            pictures of the confusion matrix and the F1 per class, and a sheet of the worst mistakes.

    Raises:
        BreedlineError: no usable bundle, or no test images, or a label that the bundle does not know.
    """
    images = ShardSet(presized, PRESIZED_COLUMNS)
    spec = read_spec(bundle)
    table = read_csv(labels, ["name", "label", "split", "sha256"])
    items = [item for item in load_items(images, table) if item.split != "train"]
    splits = np.array([item.split for item in items])
    if "test" not in splits:
        raise BreedlineError("split test has no images: raise label.test_pct, or mend label.test_list")
    if unknown := sorted(set(table["label"]) - set(spec.classes)):
        raise BreedlineError(
            f"the bundle does not know the class {', '.join(unknown[:5])}: `dvc repro train` makes a new one"
        )
    store = Store(images, pick_device(), spec.geometry.max_side)
    batches = store.batches(in_batches(items, max(1, params.batch_size // (1 + params.tta))))
    model, _ = load_bundle(bundle)  # while the first images are decoded
    with progress("evaluate (images)", len(items)) as advance:
        probabilities = predict(params, model, spec, batches, store.device, advance)
    # imported here: scikit-learn, scipy and matplotlib take as long to import as the digits to predict
    from breedline.findings import numbers_of, write_report

    target = np.array([spec.classes.index(item.label) for item in items])
    numbers = {
        split: numbers_of(params, spec, probabilities[splits == split], target[splits == split])
        for split in ("test", "valid")
        if split in splits
    }
    tested = [item for item in items if item.split == "test"]
    with new_folder(report) as folder:
        write_report(params, spec, images, tested, probabilities[splits == "test"], target[splits == "test"], folder)
    write_json(numbers, metrics)
    log.info("evaluate: accuracy %.4f on %d test images", numbers["test"]["accuracy"], numbers["test"]["images"])


def predict(
    params: Evaluate,
    model: torch.nn.Module,
    spec: BundleSpec,
    images: Iterable[Pixels],
    device: torch.device,
    advance: Callable[[int], None] = lambda images: None,
) -> np.ndarray:
    """Probabilities (images, classes) of images that come in batches.

    With test-time augmentation (`tta` augmented views), fastai's weighted mean: PLAIN_WEIGHT of the plain view, the rest
    of the mean of the augmented ones.
    """
    model = model.to(device).to(memory_format=torch.channels_last)
    augmented = _augmented_views(spec, device) if params.tta else None
    set_seed(SEED)

    def views(pixels: Pixels) -> list[torch.Tensor]:
        plain = central_views(pixels, spec.geometry, device)
        return [plain, *(augmented(pixels) for _ in range(params.tta) if augmented)]

    logits = infer(model, images, views, device=device, advance=advance)
    plain, *others = loss_function(spec.loss).activation(logits)
    mean = torch.lerp(torch.stack(others).mean(0), plain, PLAIN_WEIGHT) if others else plain
    return mean.double().cpu().numpy()


def _augmented_views(spec: BundleSpec, device: torch.device) -> Callable[[Pixels], torch.Tensor]:
    # only here is fastai needed, which takes as long to import as all else
    from breedline.augment import Transforms

    transforms = Transforms(spec.geometry, spec.augment)
    return lambda pixels: transforms.finished(pixels, device, split_idx=0)


if __name__ == "__main__":
    run(evaluate)
