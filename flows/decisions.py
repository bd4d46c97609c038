"""The gate's decisions, one JSON file each, which git keeps: what was decided, why, and how often a test set was looked at."""

from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from breedline.bundle import Sha256
from breedline.comparison import same_test_set
from breedline.errors import BreedlineError
from breedline.files import new_file

FOLDER = "decisions"
MAX_BYTES = 1_000_000
"""A longer file is not read."""


class Record(BaseModel):
    """A decision. What a comparison tells is null where there was no champion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    verdict: Literal["promote", "hold", "undecided"]
    published: bool
    reasons: list[str]
    time: AwareDatetime
    champion: str | None
    """A version such as classifier@v1.2.0, or a commit."""
    challenger: Sha256
    """Of its weights."""
    metric: str
    champion_value: float | None = None
    challenger_value: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    level: float | None = None
    fixed: int | None = None
    broken: int | None = None
    mcnemar_p: float | None = None
    images: int
    images_to_decide: int | None = None
    look: int = Field(ge=0)
    """1 for the first comparison on this test set; 0 where nothing was compared."""
    test_set: list[str]
    """breedline.comparison.sketch of it."""
    megabytes: float
    """Of the challenger's bundle."""
    slowdown: float | None = None
    """How many times the champion's seconds for an image the challenger takes."""


def decided(root: Path) -> list[Record]:
    """The decisions of the branch that is checked out at `root`, in the order of their names, which begin with the time.

    Raises:
        BreedlineError: a file is none.
    """
    return [_read(path) for path in sorted((root / FOLDER).glob("*.json"))]


def _read(path: Path) -> Record:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is too long")
        return Record.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:  # a ValidationError is a ValueError
        said = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            said = f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg']}"
        raise BreedlineError(
            f"{FOLDER}/{path.name} is no decision of the gate ({said}): restore it with git, or delete it"
        ) from error


def look_at(earlier: list[Record], champion: str, challenger: str, test_set: list[str]) -> int:
    """Which look at the test set a comparison of these two is; the same one if it was done before."""
    looks = {(one.champion, one.challenger): one.look for one in earlier if _of_same(one, test_set)}
    return looks.get((champion, challenger), 1 + len(looks))


def _of_same(record: Record, test_set: list[str]) -> bool:
    return record.look > 0 and same_test_set(record.test_set, test_set)


def write(root: Path, record: Record) -> str:
    """Write a decision; returns its path in the repository. No two have the same name, so that branches merge."""
    name = f"{FOLDER}/{record.time:%Y%m%dT%H%M%SZ}-{record.challenger[:8]}.json"
    (root / FOLDER).mkdir(exist_ok=True)
    with new_file(root / name) as temporary:
        temporary.write_text(record.model_dump_json(indent=2) + "\n", "utf-8")
    return name
