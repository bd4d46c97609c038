"""Tiny bundles and pictures. The graph is the mean of each colour, times weights that make classes of it."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from breedline.bundle import CARD, CONFIG, ONNX, WEIGHTS, seal
from breedline.preprocessing import Preprocessing

SIZE = 32
CLASSES = ["red", "green", "blue"]
HOW = Preprocessing(shorter_side=40, quality=92, input_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)
FEATURES = {"features": ["batch", 3]}
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}


def graph(
    weights: np.ndarray | None = None,
    size: int = SIZE,
    batch: object = "batch",
    external: str | None = None,
    beside: dict[str, list[object]] | None = None,
) -> bytes:
    """A graph from images to the means of their colours, its features, times `weights`, (3, classes).

    Args:
        beside: names and shapes of what it gives beside the logits, such as FEATURES.
    """
    matrix = numpy_helper.from_array((4 * np.eye(3) if weights is None else weights).astype(np.float32), "weights")
    if external:
        matrix.ClearField("raw_data")
        matrix.data_location = TensorProto.EXTERNAL
        for key, value in {"location": external, "offset": "0", "length": "36"}.items():
            matrix.external_data.add(key=key, value=value)
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["features"], keepdims=0),
        helper.make_node("MatMul", ["features", "weights"], ["logits"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, size, size])
    shapes = {"logits": [batch, matrix.dims[1]]} | (beside or {})
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "tiny", [images], outputs, [axes, matrix]),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    return model.SerializeToString()


def bundle(content: bytes | None = None, folder: Path = Path("models"), **others: Any) -> Path:
    """A bundle whose graph is `content`."""
    folder.mkdir()
    for name in (CARD, CONFIG):
        (folder / name).write_bytes(b"{}")
    for name in (ONNX, WEIGHTS):  # which stand for the same numbers
        (folder / name).write_bytes(graph() if content is None else content)
    fixed = {"arch": "tiny", "classes": CLASSES, "preprocessing": HOW, "loss": "cross_entropy", "temperature": 1.0}
    fixed |= {"none_below": 0.5, "data": {}, "code": "0" * 64, "versions": {}}
    seal(folder, **(fixed | others))
    return folder


def picture(
    colour: str, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (60, 45), **options: Any
) -> bytes:
    """A picture file of about one colour."""
    noise = np.random.default_rng(len(colour)).integers(-20, 20, (size[1], size[0], 3))
    buffer = io.BytesIO()
    image = Image.fromarray(np.clip(noise + COLOURS[colour], 0, 255).astype(np.uint8))
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()
