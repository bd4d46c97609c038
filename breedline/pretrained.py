"""The note that the weights stage leaves beside the pretrained weights, to tell the train stage whose they are."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from breedline.errors import BreedlineError
from breedline.tables import write_json

NOTE = "weights.json"


class Pretrained(BaseModel):
    """What weights.json says. The file's name is one of two, so that nothing read from it becomes a path elsewhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arch: str
    file: Literal["weights.safetensors", "weights.pth"] | None = None
    """The state dict in the same folder; None where training starts from random weights."""
    source: str | None = None
    """timm's name of the weights, tag included, or the URL of the file."""
    sha256: str | None = None


def write_note(note: Pretrained, folder: Path) -> None:
    """Write the note into `folder`."""
    write_json(note.model_dump(), folder / NOTE)


def read_note(folder: Path) -> Pretrained:
    """The note in `folder`. Raises BreedlineError when there is none, or a damaged one."""
    try:
        return Pretrained.model_validate_json((folder / NOTE).read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise BreedlineError(f"{folder / NOTE} is missing or damaged ({reason}): `dvc checkout` restores it") from error
