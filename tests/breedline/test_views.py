import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

import breedline.views
from breedline.items import Item
from breedline.pixels import Store
from breedline.shards import ShardSet
from breedline.views import Geometry, Windows, look_up, normalised

CPU = torch.device("cpu")
Presized = Callable[..., tuple[ShardSet, list[Item]]]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def decoded(images: ShardSet, item: Item) -> torch.Tensor:
    """(3, height, width) in 0 to 1."""
    with Image.open(io.BytesIO(images.read(item.shard, item.offset, item.size))) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(("size", "left", "top"), [((32, 32), 0, 0), ((42, 32), 5, 0), ((32, 39), 0, 4)])
def test_the_central_view_is_the_middle_of_the_image(
    presized: Presized, size: tuple[int, int], left: int, top: int
) -> None:
    images, items = presized([size] * 6)
    (squares,) = Store(images, CPU, 32).squares([items], 32)
    found = normalised(squares, Geometry(32, 32, MEAN, STD))
    assert found.is_contiguous(memory_format=torch.channels_last)
    for view, item in zip(found, items, strict=True):
        square = decoded(images, item)[:, top : top + 32, left : left + 32]
        wanted = (square - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        assert torch.allclose(view, wanted, atol=1e-4)


def test_a_view_is_looked_up_through_a_map(presized: Presized) -> None:
    images, items = presized([(32, 32)] * 2)
    (pixels,) = Store(images, CPU, 32).batches([items])
    flip, turn = torch.diag(torch.tensor([-1.0, 1, 1])), torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    zeros = torch.zeros(2, dtype=torch.float64)
    windows = Windows(zeros, zeros, torch.stack([flip, turn]))
    flipped, turned = look_up(pixels, windows, Geometry(32, 32, MEAN, STD), CPU)
    assert torch.allclose(flipped, decoded(images, items[0]).flip(2), atol=1e-4)
    assert torch.allclose(turned, decoded(images, items[1]).transpose(1, 2), atol=1e-4)


def test_how_many_images_are_interpolated_at_a_time_changes_nothing(
    presized: Presized, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, items = presized([(30 + number, 60 - 2 * number) for number in range(9)])
    (pixels,) = Store(images, CPU, 64).batches([items])
    middle = torch.full((9,), 0.5, dtype=torch.float64)
    windows = Windows(middle, middle, torch.eye(3).expand(9, 3, 3))
    found = []
    for chunk in (1, 4, 9):
        monkeypatch.setattr(breedline.views, "CPU_CHUNK", chunk)
        found.append(look_up(pixels, windows, Geometry(40, 32, MEAN, STD), CPU))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("item_size", "size", "max_side"), [(160, 128, 160), (160, 64, 128), (32, 32, 32)])
def test_of_a_large_image_twice_the_view_is_needed(item_size: int, size: int, max_side: int) -> None:
    assert Geometry(item_size, size, MEAN, STD).max_side == max_side
