"""Training photos to compare new ones with: what the head sees of each, and a small picture, in one file.

The file is part of evaluate's report and never of the bundle, so that whoever gets a model gets nobody's photos with it. It
is safetensors:

| tensor | shape | |
|---|---|---|
| features | (photos, features) float16 | what the head of the bundle's model sees of each photo, scaled to unit length |
| thumbnails | (bytes,) uint8 | the pictures as JPEGs, end to end |
| offsets | (photos + 1,) int64 | where each begins in thumbnails, and where the last one ends |
| note | (bytes,) uint8 | a Note as JSON |

It may come from anybody, so all of it is checked and bounded. Neither writing nor reading needs torch.
"""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from breedline.bundle import ClassName, Sha256
from breedline.errors import BreedlineError
from breedline.images import DAMAGE

FILE = "neighbours.safetensors"
MAX_BYTES = 500_000_000
"""A larger file is not read."""
MAX_PHOTOS = 10_000
MAX_NAME = 1000
"""Characters of a photo's name; of a longer one the last are kept."""
THUMBNAIL, QUALITY = 96, 85
"""Pixels of a thumbnail's side, at most, and the quality of its JPEG."""
MAX_LENGTH = 1.01
"""Of a photo's features, which have length 1 but for the rounding to float16."""
Name = Annotated[str, Field(max_length=MAX_NAME)]


class Note(BaseModel):
    """What the file says of its photos. It holds no dates, so that equal inputs give equal bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["breedline-neighbours-1"] = "breedline-neighbours-1"
    model: Sha256
    """SHA-256 of the file with the weights of the bundle whose features these are."""
    names: list[Name] = Field(min_length=1, max_length=MAX_PHOTOS)
    labels: list[ClassName] = Field(min_length=1, max_length=MAX_PHOTOS)
    sha256: Sha256 | Literal[""] = ""
    """SHA-256 of the file with nothing here."""


class Neighbour(NamedTuple):
    """A training photo, and how similar another photo is to it."""

    name: str
    label: str
    similarity: float
    """The cosine of the angle between the features of both, -1 to 1."""
    thumbnail: np.ndarray
    """(height, width, 3) bytes of its central square, THUMBNAIL pixels wide at most."""


@dataclass(frozen=True)
class Neighbours:
    """Training photos, in any order, as the model of one bundle sees them."""

    model: str
    """SHA-256 of the file with the bundle's weights."""
    names: list[str]
    labels: list[str]
    features: np.ndarray
    """(photos, features) float16, of unit length."""
    thumbnails: list[bytes]
    """As JPEGs."""

    def nearest(self, features: np.ndarray, count: int) -> list[Neighbour]:
        """The `count` photos most similar to one with these `features`, (features,), the most similar first.

        Raises:
            BreedlineError: a thumbnail of theirs is no small JPEG.
        """
        direction = of_unit_length(features[None])[0].astype(np.float32)
        similarities = np.clip(self.features.astype(np.float32) @ direction, -1, 1)
        best = np.argsort(-similarities, kind="stable")[:count]
        return [
            Neighbour(self.names[one], self.labels[one], float(similarities[one]), _decoded(self.thumbnails[one]))
            for one in best
        ]


def thumbnail(square: np.ndarray) -> bytes:
    """A small JPEG of a square, (size, size, 3) bytes."""
    picture = Image.fromarray(square)
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def of_unit_length(features: np.ndarray) -> np.ndarray:
    """The features (photos, features) in float16, each photo's divided by their length; all zeros stay zeros."""
    wide = features.astype(np.float64)  # in which no square of a float32 is too large or too small
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    return (wide / np.maximum(lengths, np.finfo(wide.dtype).tiny)).astype(np.float16)


def write(found: Neighbours, path: Path) -> None:
    """Write the file, sealed by its hash."""
    note = Note(model=found.model, names=[name[-MAX_NAME:] for name in found.names], labels=found.labels)
    tensors = {
        "features": found.features,
        "thumbnails": np.frombuffer(b"".join(found.thumbnails), np.uint8),
        "offsets": np.cumsum([0, *map(len, found.thumbnails)], dtype=np.int64),
    }
    path.write_bytes(_content(tensors, note.model_copy(update={"sha256": _sha256(tensors, note)})))


def read(path: Path, model: str, n_features: int) -> Neighbours:
    """The photos of a file, to compare with what the model of a bundle sees.

    Args:
        model: SHA-256 of the file with the bundle's weights.
        n_features: how many features of a photo its graph gives.

    Raises:
        BreedlineError: there is no such file, it is damaged, or it is of another model.
    """
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise ValueError("there is no such file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"over {MAX_BYTES / 1e6:g} MB")
        found = _parsed(path.read_bytes())
    except (OSError, ValueError, SafetensorError) as error:  # a ValidationError is a ValueError
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).splitlines()[0]
        raise BreedlineError(f"{path} cannot be used ({said}): `dvc checkout` restores it") from error
    if (found.model, found.features.shape[1]) != (model, n_features):
        raise BreedlineError(f"{path} is of another model than the bundle: `dvc repro` makes both anew")
    return found


def _parsed(data: bytes) -> Neighbours:
    """The photos in the content of a file. Raises ValueError or SafetensorError where that is not as `write` leaves it."""
    tensors = load(data)
    shapes = {name: (str(tensor.dtype), tensor.ndim) for name, tensor in tensors.items()}
    bytes_ = ("uint8", 1)
    if shapes != {"features": ("float16", 2), "thumbnails": bytes_, "offsets": ("int64", 1), "note": bytes_}:
        raise ValueError("its tensors are of other kinds")
    note = Note.model_validate_json(tensors.pop("note").tobytes())
    if note.sha256 != _sha256(tensors, note) or data != _content(tensors, note):
        raise ValueError("it was altered")
    features, offsets = tensors["features"], tensors["offsets"]
    if not len(note.names) == len(note.labels) == len(features) == len(offsets) - 1:
        raise ValueError("its tensors are of different numbers of photos")
    if not (np.linalg.norm(features.astype(np.float32), axis=1) <= MAX_LENGTH).all():  # nor if it is no number
        raise ValueError("its features are not of unit length")
    if offsets[0] != 0 or offsets[-1] != len(tensors["thumbnails"]) or not (offsets[1:] > offsets[:-1]).all():
        raise ValueError("its offsets do not lead from thumbnail to thumbnail")
    thumbnails = tensors["thumbnails"].tobytes()
    parts = [thumbnails[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    return Neighbours(note.model, note.names, note.labels, features, parts)


def _content(tensors: dict[str, np.ndarray], note: Note) -> bytes:
    return save({**tensors, "note": np.frombuffer(note.model_dump_json().encode("utf-8"), np.uint8)})


def _sha256(tensors: dict[str, np.ndarray], note: Note) -> str:
    return hashlib.sha256(_content(tensors, note.model_copy(update={"sha256": ""}))).hexdigest()


def _decoded(jpeg: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
            if max(image.size) > THUMBNAIL:
                raise ValueError
            return np.asarray(image.convert("RGB"))
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise BreedlineError("a training photo's thumbnail is no small JPEG: `dvc checkout` restores it") from error
