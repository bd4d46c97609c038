"""What the train stage leaves: weights as safetensors, and one JSON file with all that is needed to use them. No pickle."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_model, save
from torch import nn

from breedline.architectures import Architecture
from breedline.errors import BreedlineError
from breedline.files import new_folder
from breedline.params import Augment
from breedline.tables import write_json
from breedline.views import Geometry
from breedline.zoo import create_model

WEIGHTS, SPEC = "model.safetensors", "model.json"


class TrainedSpec(BaseModel):
    """The content of model.json. It holds no paths or dates, so that equal inputs give equal bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["breedline-4"] = "breedline-4"
    arch: Architecture
    classes: list[str]
    """In the order of the model's outputs."""
    geometry: Geometry
    augment: Augment
    """The augmentation in training, which test-time augmentation repeats."""
    pretrained: str | None
    """What training began with: timm's name of the weights, or their URL; None for random ones."""
    loss: Literal["cross_entropy", "bce"]
    """Decides the activation: softmax over the classes, or a sigmoid per class."""
    data: dict[str, str]
    """SHA-256 of what the model was trained on, by name."""
    code: str
    """SHA-256 of the code that trained it."""


def save_trained(folder: Path, model: nn.Module, spec: TrainedSpec) -> None:
    """Write the model, whole or not at all."""
    with new_folder(folder) as new:
        (new / WEIGHTS).write_bytes(weights(model))  # save_file would hide a full disk in an error of its own
        write_json(spec.model_dump(), new / SPEC)


def weights(model: nn.Module) -> bytes:
    """The model's numbers as safetensors, with timm's own keys."""
    return save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})


def read_spec(folder: Path) -> TrainedSpec:
    """The spec of the model. Raises BreedlineError as `load_trained` does."""
    try:
        return TrainedSpec.model_validate_json((folder / SPEC).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise _unusable(folder, error) from error


def load_trained(folder: Path) -> tuple[nn.Module, TrainedSpec]:
    """The model, on the CPU and in evaluation mode, and its spec.

    Raises:
        BreedlineError: the folder holds no model, or a damaged one, or one of another version.
    """
    spec = read_spec(folder)
    return load_weights(folder, spec.arch, len(spec.classes)), spec


def load_weights(folder: Path, arch: str, n_classes: int) -> nn.Module:
    """The model with the weights in `folder`, on the CPU and in evaluation mode.

    Raises:
        BreedlineError: there are none, or those of another model, or not all are finite.
    """
    try:
        model = create_model(arch, n_classes)
        load_model(model, folder / WEIGHTS)
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise RuntimeError("a weight is not finite")
    except (FileNotFoundError, SafetensorError, RuntimeError) as error:
        raise _unusable(folder, error) from error
    return model.eval()


def _unusable(folder: Path, error: Exception) -> BreedlineError:
    return BreedlineError(f"{folder} holds no usable model ({str(error).splitlines()[0]}): `dvc checkout` restores it")
