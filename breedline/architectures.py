"""The architectures that can be trained, by name: known without importing torch, so that a typo is told at once."""

import difflib
from functools import cache
from pathlib import Path
from typing import Annotated

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
