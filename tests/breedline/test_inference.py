from collections.abc import Callable

import pytest
import torch

from breedline.inference import in_batches, infer
from breedline.items import Item
from breedline.pixels import Pixels, Store
from breedline.shards import ShardSet

Presized = Callable[..., tuple[ShardSet, list[Item]]]
WIDTHS = [10, 11, 12, 13, 14, 15, 16]


@pytest.fixture
def images(presized: Presized) -> tuple[Store, list[Item]]:
    shards, items = presized([(width, 20) for width in WIDTHS])
    return Store(shards, torch.device("cpu"), 64), items


def views(pixels: Pixels) -> list[torch.Tensor]:
    """Two views of each image, of one number each: its width, and its negative."""
    assert not torch.is_autocast_enabled("cpu"), "the position of a pixel needs all digits"
    width = pixels.width.float().reshape(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    return [width, -width]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_outputs_are_in_the_order_of_views_and_images(images: tuple[Store, list[Item]], batch_size: int) -> None:
    sizes, done = [], []

    def model(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return torch.cat([batch[:, 0, 0], 2 * batch[:, 0, 0]], dim=1)

    store, items = images
    batches = store.batches(in_batches(items, batch_size))
    found = infer(model, batches, views, device=store.device, advance=done.append)
    wanted = torch.tensor([[(w, 2 * w) for w in WIDTHS], [(-w, -2 * w) for w in WIDTHS]], dtype=torch.float32)
    assert torch.equal(found, wanted)
    assert sum(sizes) == 14
    assert max(sizes) == 2 * min(batch_size, 7)
    assert sum(done) == 7


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_computes_in_the_precision_and_gives_fp32(images: tuple[Store, list[Item]], precision: str) -> None:
    layer = torch.nn.Conv2d(3, 5, 1)
    computed = set()

    def model(batch: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        output = layer(batch).flatten(1)
        computed.add(output.dtype)
        return output

    store, items = images
    batches = store.batches(in_batches(items, 3))
    found = infer(model, batches, views, device=store.device, precision=precision)
    assert computed == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert found.dtype == torch.float32
    assert found.shape == (2, 7, 5)
    assert not torch.is_autocast_enabled("cpu")
