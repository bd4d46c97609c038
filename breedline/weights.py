"""Pretrained weights, fetched and pinned before training, which then needs no network.

This module does not import torch: the train stage reads what the files hold.
"""

import shutil
from pathlib import Path
from typing import Literal

from breedline.architectures import IMAGENET, PACKAGED, packaged_weights
from breedline.fetch import fetch, name_of
from breedline.files import new_folder, sha256_of
from breedline.params import Weights
from breedline.pretrained import Pretrained, write_note
from breedline.urls import redacted

TORCHVISION = "https://download.pytorch.org/models/"
TIMM = "https://huggingface.co/timm/{arch}/resolve/main/model.safetensors"
MAX_BYTES = 20e9
"""Larger weights are refused; the largest of timm's have 11 GB."""


def fetch_weights(params: Weights, arch: str, folder: Path) -> None:
    """Put the weights that `params` names for `arch` into `folder`, with a note of what they are.

    Raises:
        BreedlineError: they are not there, or not as pinned.
    """
    with new_folder(folder) as new:
        if params.source == "none":
            write_note(Pretrained(arch=arch), new)
            return
        if params.source == "imagenet":
            url, sha256, name = _imagenet(arch)
        else:
            url, sha256, name = params.source.url, params.source.sha256, params.source.url
        local = fetch(url, sha256, timeout=params.timeout, max_bytes=MAX_BYTES)
        file: Literal["weights.safetensors", "weights.pth"] = (
            "weights.safetensors" if name_of(url).endswith(".safetensors") else "weights.pth"
        )
        shutil.copyfile(local, new / file)
        write_note(Pretrained(arch=arch, file=file, url=redacted(name), sha256=sha256_of(new / file)), new)


def _imagenet(arch: str) -> tuple[str, str | None, str]:
    """Where the ImageNet weights of `arch` lie, what their SHA-256 begins with where that is known, and a name for that."""
    if path := packaged_weights(arch):  # named by its package, as the path is this machine's alone
        packaged = PACKAGED[arch.removesuffix(".in1k")]
        return str(path), packaged.sha256, packaged.package
    if file := IMAGENET.get(arch):
        return TORCHVISION + file, file.removesuffix(".pth").rpartition("-")[2], TORCHVISION + file
    return TIMM.format(arch=arch), None, TIMM.format(arch=arch)
