"""Pretrained weights, fetched and pinned before training, which then needs no network.

This module does not import torch: the train stage reads what the files hold.
"""

import difflib
import shutil
from pathlib import Path
from typing import Literal

from breedline.errors import BreedlineError
from breedline.fetch import fetch, name_of
from breedline.files import new_folder, sha256_of
from breedline.params import Weights
from breedline.pretrained import Pretrained, write_note
from breedline.urls import redacted

TORCHVISION = "https://download.pytorch.org/models/"
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
TIMM = "https://huggingface.co/timm/{arch}/resolve/main/model.safetensors"


MAX_BYTES = 20e9
"""Larger weights are refused; the largest of timm's have 11 GB."""


def fetch_weights(params: Weights, arch: str, folder: Path) -> None:
    """Put the weights that `params` names for `arch` into `folder`, with a note of what they are.

    Raises:
        BreedlineError: no weights are known for `arch`, or they are not as pinned.
    """
    with new_folder(folder) as new:
        if params.source == "none":
            write_note(Pretrained(arch=arch), new)
            return
        if params.source == "imagenet":
            url, sha256 = _imagenet(arch)
        else:
            url, sha256 = params.source.url, params.source.sha256
        local = fetch(url, sha256, timeout=params.timeout, max_bytes=MAX_BYTES)
        file: Literal["weights.safetensors", "weights.pth"] = (
            "weights.safetensors" if name_of(url).endswith(".safetensors") else "weights.pth"
        )
        shutil.copyfile(local, new / file)
        write_note(Pretrained(arch=arch, file=file, url=redacted(url), sha256=sha256_of(new / file)), new)


def _imagenet(arch: str) -> tuple[str, str | None]:
    if file := IMAGENET.get(arch):
        return TORCHVISION + file, file.removesuffix(".pth").rpartition("-")[2]
    if "." in arch:
        return TIMM.format(arch=arch), None
    near = difflib.get_close_matches(arch, IMAGENET, 3, 0.5)
    raise BreedlineError(
        f"no imagenet weights are known for train.arch {arch!r}: "
        + (f"did you mean {' or '.join(near)}? " if near else "")
        + "For a timm model add the tag of its weights, such as convnext_tiny.in12k_ft_in1k"
    )
