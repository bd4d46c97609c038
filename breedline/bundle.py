"""The model bundle: a folder that timm, transformers and ONNX Runtime load without Breedline, and that nobody can alter unseen.

| file | for |
|---|---|
| config.json, model.safetensors | `timm.create_model("local-dir:models", pretrained=True)`, and transformers' pipeline |
| model.onnx | any ONNX runtime: from normalised images to logits and, where the head is one linear layer, features |
| README.md | people, as the Hugging Face Hub shows it |
| breedline.json | Breedline: what is not in the others, and their SHA-256 |

Nothing in it is a pickle, and reading it runs no code. It needs neither torch nor timm.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from breedline.errors import BreedlineError
from breedline.files import sha256_of
from breedline.preprocessing import Preprocessing

SPEC = "breedline.json"
CARD, CONFIG, ONNX, WEIGHTS = "README.md", "config.json", "model.onnx", "model.safetensors"
FILES = (CARD, CONFIG, ONNX, WEIGHTS)
OUTPUTS = ("logits", "features")
"""Of the ONNX graph, in this order. Without features where the head is not one linear layer, whose input they are."""
MAX_SPEC = 64_000_000
"""Bytes of breedline.json; a longer one is not read."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ClassName = Annotated[str, Field(min_length=1, max_length=1000)]


class BundleSpec(BaseModel):
    """The content of breedline.json. It holds no paths or dates, so that equal inputs give equal bundles."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["breedline-3"] = "breedline-3"
    arch: str = Field(pattern=r"^[\w.]{1,200}$")
    """timm's name."""
    classes: list[ClassName] = Field(min_length=1, max_length=100_000)
    """In the order of the model's outputs."""
    preprocessing: Preprocessing
    loss: Literal["cross_entropy", "bce"]
    """Decides what turns logits into probabilities: softmax over the classes, or a sigmoid per class."""
    temperature: float = Field(gt=0, allow_inf_nan=False)
    """What the logits of the trained model were divided by; the head's weights already are."""
    none_below: float = Field(ge=0, le=1)
    """A photo whose highest probability is lower shows none of the classes."""
    data: dict[str, Sha256]
    """SHA-256 of what the model was trained on, by name."""
    code: Sha256
    """SHA-256 of the code that trained it."""
    versions: dict[str, str]
    """Of the libraries that made the bundle."""
    files: dict[str, Sha256]
    """SHA-256 of each other file."""
    sha256: Sha256 | Literal[""] = ""
    """SHA-256 of this text with nothing here."""


def seal(folder: Path, **values: Any) -> BundleSpec:
    """Write breedline.json for the FILES in `folder`; `values` are the fields of the spec that they do not decide."""
    open_spec = BundleSpec(**values, files={name: sha256_of(folder / name) for name in FILES})
    spec = open_spec.model_copy(update={"sha256": hashlib.sha256(_text(open_spec)).hexdigest()})
    (folder / SPEC).write_bytes(_text(spec))
    return spec


def read_bundle(folder: Path) -> BundleSpec:
    """The spec of the bundle, after a check of every byte of the folder.

    Raises:
        BreedlineError: the folder is no bundle, one of another version, or not as it was written: a file is missing, added
            or altered.
    """
    try:
        spec = _read(folder)
        if differ := sorted({file.name for file in folder.iterdir()} ^ {SPEC, *FILES}):
            raise ValueError(f"{differ[0]!r} is missing, or does not belong there")
        for name in FILES:
            if not (folder / name).is_file():  # reading a pipe would wait for ever
                raise ValueError(f"{name} is not a file")
            if sha256_of(folder / name) != spec.files.get(name):
                raise ValueError(f"{name} was altered")
    except (OSError, ValueError) as error:  # a ValidationError is a ValueError
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise BreedlineError(f"{folder} is no usable bundle ({said}): `dvc checkout {folder}` restores it") from error
    return spec


def _read(folder: Path) -> BundleSpec:
    path = folder / SPEC
    if not path.is_file():
        raise ValueError(f"it has no file {SPEC}")
    if path.stat().st_size > MAX_SPEC:
        raise ValueError(f"{SPEC} is too long")
    text = path.read_bytes()
    spec = BundleSpec.model_validate_json(text)
    opened = spec.model_copy(update={"sha256": ""})
    if text != _text(spec) or spec.sha256 != hashlib.sha256(_text(opened)).hexdigest():
        raise ValueError(f"{SPEC} was altered")
    return spec


def _text(spec: BundleSpec) -> bytes:
    return (json.dumps(spec.model_dump(), indent=2, ensure_ascii=False) + "\n").encode("utf-8")
