"""What a model says of views of many images, batch by batch, without gradients."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from breedline.device import autocast
from breedline.pixels import Pixels

T = TypeVar("T")

Views = Callable[[Pixels], Sequence[torch.Tensor]]
"""From the pixels of some images to as many batches as there are views of each: (images, 3, size, size)."""


def infer(
    function: Callable[[torch.Tensor], torch.Tensor],
    images: Iterable[Pixels],
    views: Views,
    *,
    device: torch.device,
    precision: str = "fp32",
    advance: Callable[[int], None] = lambda images: None,
) -> torch.Tensor:
    """The outputs of `function`, (views, images, outputs) in float32 on the device.

    All views of some images are in the same batch, so that each is decoded once.

    Args:
        function: a model in evaluation mode, or a part of one: from (images, 3, size, size) to (images, outputs).
        images: a batch at a time, as `Store.batches` gives them.
    """
    found = []
    with torch.inference_mode():
        for pixels in images:
            batches = views(pixels)  # in float32: the position of a pixel has more digits than bf16
            with autocast(device, precision):
                outputs = function(torch.cat(list(batches))).float()
            found.append(outputs.view(len(batches), -1, outputs.shape[-1]))
            advance(len(pixels.start))
    return torch.cat(found, dim=1)


def in_batches(items: Sequence[T], batch_size: int) -> Iterator[Sequence[T]]:
    """The items, `batch_size` at a time."""
    return (items[first : first + batch_size] for first in range(0, len(items), batch_size))
