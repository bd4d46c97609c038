"""What was trained and measured, as a bundle that loads everywhere."""

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from breedline.bundle import CARD, CONFIG, ONNX, OUTPUTS, WEIGHTS, BundleSpec, seal
from breedline.card import model_card
from breedline.edge import run
from breedline.errors import BreedlineError
from breedline.export import config, onnx_graph
from breedline.files import new_folder
from breedline.inference import in_batches
from breedline.items import Item, load_items
from breedline.params import Bundle
from breedline.pixels import Store
from breedline.preprocessing import Preprocessing
from breedline.progress import progress
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from breedline.tables import read_csv, write_json
from breedline.trained import load_trained, weights
from breedline.views import Geometry, normalised
from breedline.zoo import divide_logits, has_linear_head, linear_head

log = logging.getLogger("breedline")
TOLERANCE = 1e-3
"""By how much a logit or a feature of the ONNX graph may differ from torch's, relative to the largest one."""
AT_ONCE = 32
"""Images in a batch of the comparison."""


def bundle(
    params: Bundle,
    trained: Path,
    presized: Path,
    labels: Path,
    metrics: Path,
    report: Path,
    item_size: int,
    quality: int,
    *,
    models: Path,
) -> None:
    """Pack the trained model for use: with timm's and transformers' configuration, an ONNX graph, and a model card.

    Args:
        metrics: those of evaluate, with the temperature and the threshold that it has found.
        report: folder of evaluate's report.
        item_size: presize.shorter_side.
        quality: presize.quality.
        models: folder for the bundle.

    Raises:
        BreedlineError: no usable model, or one that ONNX cannot express, or whose ONNX graph gives other answers.
    """
    model, spec = load_trained(trained)
    numbers = json.loads(metrics.read_text("utf-8"))
    calibration = numbers["calibration"]
    divide_logits(model, calibration["temperature"])
    geometry = spec.geometry
    shown: dict[str, Any] = {"input_size": geometry.size, "mean": geometry.mean, "std": geometry.std}
    how = Preprocessing(shorter_side=item_size, quality=quality, **shown)
    known = {
        "arch": spec.arch,
        "classes": spec.classes,
        "preprocessing": how,
        "loss": spec.loss,
        **calibration,
        "data": spec.data,
        "code": spec.code,
        "versions": {name: version(name) for name in ("torch", "timm", "onnx", "pillow")},
    }
    images = ShardSet(presized, PRESIZED_COLUMNS)
    table = read_csv(labels, ["name", "label", "split", "sha256"])
    tested = [item for item in load_items(images, table) if item.split == "test"]
    scores = read_csv(report / "per_class.csv", ["class", "f1", "precision", "recall", "images"], integers=["images"])
    with new_folder(models) as folder:
        (folder / WEIGHTS).write_bytes(weights(model))
        write_json(config(model, spec), folder / CONFIG)
        (folder / ONNX).write_bytes(onnx_graph(model, geometry.size))
        card = model_card(BundleSpec(**known, files={}), numbers, scores, table, params.license, spec.pretrained)
        (folder / CARD).write_text(card, "utf-8")
        seal(folder, **known)
        compare(model, folder / ONNX, Store(images, torch.device("cpu"), geometry.max_side), tested, geometry)


def compare(model: torch.nn.Module, graph: Path, store: Store, items: list[Item], geometry: Geometry) -> None:
    """Compare the answers of the model and of its ONNX graph, logits and features, for all items.

    Raises:
        BreedlineError: they differ by more than TOLERANCE, or in the best class of an image.
    """
    session = onnxruntime.InferenceSession(graph.read_bytes(), providers=["CPUExecutionProvider"])
    worst, largest, other = np.zeros(1), np.zeros(1), 0
    squares = store.squares(in_batches(items, AT_ONCE), geometry.size)
    with torch.inference_mode(), progress("bundle (ONNX against torch, images)", len(items)) as advance:
        for batch in squares:
            inputs = normalised(batch, geometry)
            wanted = answers(model, inputs)
            found = session.run(None, {"images": np.ascontiguousarray(inputs.numpy())})
            finite = all(np.isfinite(output).all() for output in found)
            if not finite or [output.shape for output in found] != [output.shape for output in wanted]:
                raise BreedlineError("the ONNX graph gives no finite logits and features: choose another train.arch")
            worst = np.maximum(worst, [abs(one - same).max() for one, same in zip(found, wanted, strict=True)])
            largest = np.maximum(largest, [abs(output).max() for output in wanted])
            other += int((found[0].argmax(1) != wanted[0].argmax(1)).sum())
            advance(len(batch))
    if other or (worst > TOLERANCE * largest).any():
        told = " and ".join(f"{what} differ by {by:.2g}" for what, by in zip(OUTPUTS, worst, strict=False))
        raise BreedlineError(
            f"the ONNX graph gives other answers than the model ({other} of {len(items)} images; {told}): "
            "choose another train.arch"
        )
    log.info("bundle: the ONNX graph agrees on all %d test images; logits differ by at most %.1e", len(items), worst[0])


def answers(model: torch.nn.Module, inputs: torch.Tensor) -> list[np.ndarray]:
    """The model's logits (images, classes) and, where one linear layer makes them, its input (images, features)."""
    if not has_linear_head(model):
        return [model(inputs).numpy()]
    seen: list[torch.Tensor] = []
    with linear_head(model).register_forward_pre_hook(lambda layer, given: seen.extend(given)):
        logits = model(inputs)
    return [output.numpy() for output in (logits, *seen)]


if __name__ == "__main__":
    run(bundle)
