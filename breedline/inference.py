"""What a model says of many images, batch by batch, without gradients."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from breedline.device import autocast

T = TypeVar("T")


def infer(
    function: Callable[[torch.Tensor], torch.Tensor],
    images: Iterable[T],
    views: Callable[[T], Sequence[torch.Tensor]],
    *,
    device: torch.device,
    precision: str = "fp32",
    advance: Callable[[int], None] = lambda images: None,
) -> torch.Tensor:
    """The outputs of `function`, (views, images, outputs) in float32 on the device.

    All views of some images are in the same batch, so that each is decoded once.

    Args:
        function: a model in evaluation mode, or a part of one: from (images, 3, size, size) to (images, outputs).
        images: a batch at a time, as `Store.batches` or `Store.squares` gives them.
        views: from such a batch to as many inputs of the model as there are views of each image: (images, 3, size, size).
    """
    found = []
    with torch.inference_mode():
        for batch in images:
            batches = views(batch)  # in float32: the position of a pixel has more digits than bf16
            with autocast(device, precision):
                outputs = function(torch.cat(list(batches))).float()
            found.append(outputs.view(len(batches), -1, outputs.shape[-1]))
            advance(found[-1].shape[1])
    return torch.cat(found, dim=1)


def in_batches(items: Sequence[T], batch_size: int) -> Iterator[Sequence[T]]:
    """The items, `batch_size` at a time."""
    return (items[first : first + batch_size] for first in range(0, len(items), batch_size))
