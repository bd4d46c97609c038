"""What a model says of views of many images, batch by batch, without gradients."""

from collections.abc import Callable, Sequence

import torch

from breedline.device import autocast
from breedline.items import Item, Photo
from breedline.pixels import Pixels, Store

Views = Callable[[Pixels], Sequence[torch.Tensor]]
"""From the pixels of some images to as many batches as there are views of each: (images, 3, size, size)."""


def infer(
    function: Callable[[torch.Tensor], torch.Tensor],
    store: Store,
    items: Sequence[Item | Photo],
    views: Views,
    *,
    batch_size: int,
    precision: str = "fp32",
    advance: Callable[[int], None] = lambda images: None,
) -> torch.Tensor:
    """The outputs of `function`, (views, images, outputs) in float32 on the device.

    All views of an image are in the same batch, so that it is decoded once.

    Args:
        function: a model in evaluation mode, or a part of one: from (images, 3, size, size) to (images, outputs).
        batch_size: images at a time, before their views are counted.
    """
    found = []
    chunks = (items[first : first + batch_size] for first in range(0, len(items), batch_size))
    with torch.inference_mode(), autocast(store.device, precision):
        for pixels in store.batches(chunks):
            batches = views(pixels)
            outputs = function(torch.cat(list(batches))).float()
            found.append(outputs.view(len(batches), -1, outputs.shape[-1]))
            advance(len(pixels.start))
    return torch.cat(found, dim=1)
