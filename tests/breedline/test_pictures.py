import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib.mathtext
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from breedline.augment import Transforms
from breedline.items import Item
from breedline.loader import PixelsDL, data_block
from breedline.params import Augment
from breedline.pictures import (
    MAX_LABEL,
    batch_picture,
    confusion_picture,
    f1_picture,
    finder_picture,
    loss_picture,
    schedule_picture,
    sheet_picture,
    short,
)
from breedline.pixels import Store
from breedline.shards import ShardSet
from breedline.views import Geometry

UGLY = [
    "$x$",
    r"$\frac$",
    "[bold]red[/]",
    "<b>&amp;",
    "a name too long to stand beside the others",
    "a\nb\t\x07",
    "100%",
]
EPOCH = {"train_loss": 0.4, "valid_loss": 0.5, "accuracy": 0.9}
SCHEDULE = [0.01, 0.02, 0.9]


def _confusion(path: Path, classes: list[str]) -> None:
    counts = pd.DataFrame(np.eye(len(classes), dtype=int) + 1, index=classes, columns=classes)
    confusion_picture(counts, "$x$", path)


def _f1(path: Path, classes: list[str]) -> None:
    f1_picture(pd.DataFrame({"class": classes, "f1": 0.5, "images": 3}), 0.5, "$x$", path)


def _sheet(path: Path, classes: list[str]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, "JPEG")
    sheet_picture([(name, buffer.getvalue()) for name in classes], path)


def _finder(path: Path, classes: list[str]) -> None:
    lrs = [10.0 ** (number / 5 - 7) for number in range(40)]
    finder_picture(lrs, lrs, {"valley": 1e-4, "steepest": 1e-3, "minimum_tenth": 1e-2}, path)


DRAWN: list[Callable[[Path, list[str]], None]] = [_confusion, _f1, _sheet, _finder]


@pytest.mark.parametrize("draw", DRAWN)
def test_text_is_never_read_as_a_formula(
    draw: Callable[[Path, list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        matplotlib.mathtext.MathTextParser, "parse", lambda _, text, *__, **___: pytest.fail(f"{text} as a formula")
    )
    classes = UGLY if draw is _sheet else list(map(short, UGLY))
    draw(tmp_path / "picture.png", [name for name in classes if name.isprintable()])


def test_labels_above_a_batch_are_text(
    presized: Callable[[list[tuple[int, int]]], tuple[ShardSet, list[Item]]], tmp_path: Path
) -> None:
    images, items = presized([(40, 40)] * 12)
    items = [replace(item, label=UGLY[number % 2] + r"$\no{$") for number, item in enumerate(items)]
    augment = Augment(flip=True, max_rotate=10, max_zoom=1.1, max_warp=0.2, max_lighting=0.2, min_scale=0.4)
    transforms = Transforms(Geometry(40, 32, (0.5,) * 3, (0.5,) * 3), augment)
    block = data_block(images, sorted({item.label for item in items}), transforms)
    cpu = torch.device("cpu")
    store = Store(images, cpu, 64)
    dls = block.dataloaders(items, bs=4, device=cpu, dl_type=PixelsDL, store=store, transforms=transforms)
    batch_picture(dls, tmp_path / "batch.png")
    with Image.open(tmp_path / "batch.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize("classes", [1, 2, 37, 100])
@pytest.mark.parametrize("draw", [_confusion, _f1])
def test_pictures_of_classes_grow_with_their_number(
    draw: Callable[[Path, list[str]], None], tmp_path: Path, classes: int
) -> None:
    draw(tmp_path / "picture.png", [f"{UGLY[0]} {number}" for number in range(classes)])
    with Image.open(tmp_path / "picture.png") as picture:
        assert 18 * classes < picture.height < 3000
        assert 300 < picture.width < 3000


@pytest.mark.parametrize("name", UGLY)
def test_a_long_label_keeps_both_ends(name: str) -> None:
    text = short(name)
    assert len(text) <= MAX_LABEL
    assert text.isprintable()
    assert (text[:13], text[-13:]) == (short(name[:13]), short(name[-13:]))


def _coloured(path: Path) -> int:
    """The number of pixels with a colour in the plot, below the legend."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"), dtype=int)[60:]
    return int((np.ptp(pixels, axis=2) > 80).sum())


@pytest.mark.parametrize("count", [1, 2, 200])
def test_each_batch_of_a_schedule_is_seen(tmp_path: Path, count: int) -> None:
    schedule_picture([SCHEDULE] * count, tmp_path / "schedule.png")
    assert _coloured(tmp_path / "schedule.png") > 20


@pytest.mark.parametrize(("first", "count"), [(0, 2), (0, 30), (1, 1), (1, 2), (1, 30)])
def test_each_epoch_is_seen(tmp_path: Path, first: int, count: int) -> None:
    epochs = dict.fromkeys(range(first, first + count), EPOCH)
    if first == 0:
        epochs[0] = {name: EPOCH[name] for name in ("valid_loss", "accuracy")}  # a fitted head has no loss of training
    loss_picture(epochs, tmp_path / "loss.png")
    assert _coloured(tmp_path / "loss.png") > 20


def test_equal_pictures_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        _confusion(tmp_path / name, ["a", "b"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
