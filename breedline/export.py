"""The trained model in the forms that others load: timm's configuration and an ONNX graph."""

from typing import Any

import onnx
import torch
from torch import nn

from breedline.bundle import OUTPUTS
from breedline.errors import BreedlineError
from breedline.trained import TrainedSpec
from breedline.zoo import features, has_linear_head, linear_head

OPSET = 18
"""Of ONNX: what its runtimes have known since 2023."""


def config(model: nn.Module, spec: TrainedSpec) -> dict[str, Any]:
    """config.json, as timm and transformers read it. Its transform makes the squares that preprocessing.py makes."""
    known: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    geometry = spec.geometry
    own = {
        "tag": "breedline",
        "input_size": [3, geometry.size, geometry.size],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
        "mean": geometry.mean,
        "std": geometry.std,
        "num_classes": len(spec.classes),
    }
    kind = {"problem_type": "multi_label_classification"} if spec.loss == "bce" else {}
    return {
        "architecture": spec.arch,
        "num_classes": len(spec.classes),
        "num_features": model.num_features,
        "label_names": spec.classes,
        **kind,
        "pretrained_cfg": {**own, **{name: known.get(name) for name in ("first_conv", "classifier")}},
    }


class _WithFeatures(nn.Module):
    """A model with a linear head that gives its logits, and the features that they are made of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.head = model, linear_head(model)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = features(self.model, images)
        return self.head(seen), seen


def onnx_graph(model: nn.Module, size: int) -> bytes:
    """model.onnx: from `images`, (batch, 3, size, size) normalised, to `logits`, (batch, classes).

    Where the head is one linear layer, the graph also gives what that sees: `features`, (batch, features).

    Raises:
        BreedlineError: the architecture has operations that ONNX has not.
    """
    whole, outputs = (_WithFeatures(model), OUTPUTS) if has_linear_head(model) else (model, OUTPUTS[:1])
    try:
        program = torch.onnx.export(
            whole.eval(),
            (torch.zeros(2, 3, size, size),),  # of one image, the exporter would take the batch to be constant
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=list(outputs),
            opset_version=OPSET,
            verbose=False,
        )
    except (torch.onnx.errors.OnnxExporterError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BreedlineError(f"the model has no form in ONNX ({reason}): choose another train.arch") from error
    graph = program.model_proto  # type: ignore[union-attr]  # None comes of the older exporter only
    _forget_sources(graph)
    return graph.SerializeToString(deterministic=True)


def _forget_sources(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes for its developers: they name the source files of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
