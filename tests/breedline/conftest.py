"""Presized images, of which each pixel is known, and what a training on them has."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from breedline.checkpoints import Checkpoints
from breedline.items import Item
from breedline.params import Params
from breedline.pixels import Store
from breedline.pretrained import Pretrained, write_note
from breedline.shards import PRESIZED_COLUMNS, ShardSet, pack, write_index
from breedline.training import Training
from breedline.views import Geometry

Sizes = list[tuple[int, int]]


def _photo(number: int, width: int, height: int) -> bytes:
    """Soft shapes, as a photo has, in a format that loses nothing."""
    noise = np.random.default_rng(number).integers(0, 255, (4, 5, 3), dtype="uint8")
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def presized(tmp_path: Path) -> Callable[[Sizes], tuple[ShardSet, list[Item]]]:
    """A function that makes a shard set of pictures of these (width, height), every fourth one of split `valid`."""

    def make(sizes: Sizes) -> tuple[ShardSet, list[Item]]:
        folder = tmp_path / "presized"
        folder.mkdir()
        photos = [_photo(number, *size) for number, size in enumerate(sizes)]
        files = ((f"{number}.png", len(data), io.BytesIO(data)) for number, data in enumerate(photos))
        entries = list(pack(files, folder, "00"))
        rows = [
            {**entry._asdict(), "height": height, "width": width, "made": "kept", "origin": entry.sha256}
            for entry, (width, height) in zip(entries, sizes, strict=True)
        ]
        write_index(pd.DataFrame(rows, columns=PRESIZED_COLUMNS), folder)
        items = []
        for number, (entry, (width, height)) in enumerate(zip(entries, sizes, strict=True)):
            split, label = "valid" if number % 4 == 3 else "train", "ab"[number % 2]
            place = (entry.shard, entry.offset, entry.size)
            items.append(Item(entry.name, label, split, entry.sha256, *place, height, width))
        return ShardSet(folder, PRESIZED_COLUMNS), items

    return make


@pytest.fixture
def training(
    presized: Callable[[Sizes], tuple[ShardSet, list[Item]]], defaults: Params, tmp_path: Path
) -> Callable[..., Training]:
    """A function that makes a training on 24 pictures of two classes, 18 of them to train on; with pretrained weights.

    The labels are no matter of what is seen.
    """

    def make(pretrained: bool = True, **settings: object) -> Training:
        images, items = presized([(40 + number, 44) for number in range(24)])
        weights, report = tmp_path / "weights", tmp_path / "report"
        weights.mkdir()
        report.mkdir()
        if pretrained:
            torch.manual_seed(1)
            save_file(timm.create_model("test_resnet").state_dict(), weights / "weights.safetensors")
        file = "weights.safetensors" if pretrained else None
        write_note(Pretrained(arch="test_resnet", file=file, source="somewhere"), weights)
        fixed = {"arch": "test_resnet", "image_size": 32, "batch_size": 10, "freeze_epochs": "fit", "epochs": 1}
        params = defaults.train.model_copy(update={**fixed, "precision": "fp32", **settings})
        geometry = Geometry(40, 32, (0.5,) * 3, (0.25,) * 3)
        store = Store(images, torch.device("cpu"), geometry.max_side)
        return Training(params, ["a", "b"], items, geometry, weights, store, "fp32", Checkpoints({}), report)

    return make
