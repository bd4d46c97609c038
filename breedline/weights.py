"""Pretrained weights, fetched and pinned before training, which then needs no network.

This module does not import torch: the train stage reads what the files hold.
"""

import logging
import shutil
from pathlib import Path
from typing import Literal

from breedline.architectures import PACKAGED, PINNED, packaged_weights, pretrained_name, pretrained_url
from breedline.errors import BreedlineError
from breedline.fetch import fetch, name_of
from breedline.files import new_folder, sha256_of
from breedline.params import Weights
from breedline.pretrained import Pretrained, write_note
from breedline.urls import redacted

log = logging.getLogger("breedline")

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
        if name_of(url).endswith(".npz"):
            raise BreedlineError(
                f"{redacted(url)} holds no state dict: give weights.source a .safetensors or .pth file"
            )
        local = fetch(url, sha256, timeout=params.timeout, max_bytes=MAX_BYTES)
        file: Literal["weights.safetensors", "weights.pth"] = (
            "weights.safetensors" if name_of(url).endswith(".safetensors") else "weights.pth"
        )
        shutil.copyfile(local, new / file)
        write_note(Pretrained(arch=arch, file=file, source=redacted(name), sha256=sha256_of(new / file)), new)


def _imagenet(arch: str) -> tuple[str, str | None, str]:
    """Where the ImageNet weights of `arch` lie, what their SHA-256 begins with where that is known, and timm's name of them.

    A URL with a hash has the same tensors as timm's file on the Hub, which was made of it, but some under their older
    names; breedline.zoo loads either through timm, which renames them. Any revision of a file on the Hub is taken.
    """
    full = pretrained_name(arch)
    if not full:
        raise BreedlineError(
            f"there are no pretrained weights of {arch}: set weights.source to none or the url of a file"
        )
    if full != arch:
        log.info("weights: %s stands for %s", arch, full)
    if path := packaged_weights(full):
        return str(path), PACKAGED[full].sha256, full
    url = pretrained_url(full)
    pinned = PINNED.search(url)
    return url, pinned["sha256"] if pinned else None, full
