"""fastai's transforms: as the DataBlock has them, and as the random views of a batch that they draw.

fastai interpolates after each of them: the crop, then flip, warp, rotation and zoom, then the crop and resize on the
batch. Here the geometric ones only draw their random numbers, in fastai's order, so that equal seeds give fastai's batches, except
for the blur of repeated interpolation; views.py looks up each pixel once.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.torch_core import TensorBase
from fastai.vision.augment import RandomResizedCropGPU, Resize, aug_transforms, find_coeffs
from fastai.vision.core import TensorImage
from fasttransform import Pipeline, compose_tfms

from breedline.params import Augment
from breedline.pixels import Pixels
from breedline.views import Geometry, Windows, look_up

TRAINING = 0
"""fastai's number of the split that is trained on, for which alone its transforms are random."""
NOTHING: dict[str, Any] = {"do_flip": False, "max_rotate": 0, "max_zoom": 1, "max_warp": 0, "max_lighting": 0}
"""Arguments of `aug_transforms` that change nothing."""


class Drawn(NamedTuple):
    """The random numbers of a batch: all that its views are made of, but for the pixels."""

    windows: Windows
    colours: tuple[torch.Tensor, ...]
    """(images,) each: what fastai's changes of brightness and contrast have drawn, if there are any."""

    def take(self, images: slice) -> "Drawn":
        """Those of some of the images."""
        windows = Windows(*(numbers[images] for numbers in self.windows))
        return Drawn(windows, tuple(numbers[images] for numbers in self.colours))

    def cpu(self) -> "Drawn":
        """The same, to be sent to another process."""
        return self._replace(colours=tuple(numbers.cpu() for numbers in self.colours))


class Transforms:
    """The transforms from an image to the normalised view of it that a batch has."""

    def __init__(self, geometry: Geometry, augment: Augment) -> None:
        self.geometry = geometry
        self.crop = Resize(geometry.item_size)
        shape = {name: getattr(augment, name) for name in ("max_rotate", "max_zoom", "max_warp")}
        self.affine = aug_transforms(**{**NOTHING, **shape, "do_flip": augment.flip})
        # aug_transforms has a `size`, too, but drops it if no affine transform is asked for
        self.window = RandomResizedCropGPU(geometry.size, min_scale=augment.min_scale, ratio=(1, 1))
        self.lighting = aug_transforms(**{**NOTHING, "max_lighting": augment.max_lighting})
        self.normalize = Normalize.from_stats(geometry.mean, geometry.std)
        self.replaced = [IntToFloatTensor(), *self.affine, self.window, *self.lighting]
        """The batch transforms that `draw` and `views` stand for."""

    @property
    def item(self) -> list[Any]:
        """A DataBlock's item transforms."""
        return [self.crop]

    @property
    def batch(self) -> list[Any]:
        """A DataBlock's batch transforms."""
        return [*self.replaced, self.normalize]

    def finished(self, pixels: Pixels, device: torch.device, drawn: Drawn | None = None) -> torch.Tensor:
        """Random views of a batch after all transforms, as a plain tensor; as `drawn`, or else drawn now."""
        drawn = drawn or self.draw(len(pixels.start), device)
        views = TensorImage(self.views(pixels, drawn, device))
        return Pipeline([self.normalize], split_idx=TRAINING)(views).as_subclass(torch.Tensor)

    def draw(self, count: int, device: torch.device) -> Drawn:
        """Draw what makes `count` views random; the changes of their colours on the device."""
        # fastai's classes of tensors dispatch each operation in Python, which takes longer than a GPU needs for a batch
        with torch._C.DisableTorchFunctionSubclass():
            windows = Windows(*self._crops(count), self._maps(count))
            like = torch.empty(1, device=device).expand(count)
            for lighting in self.lighting:  # one, of brightness and contrast, or none
                lighting.before_call(like, TRAINING)
            return Drawn(windows, tuple(_plain(change.change) for change in self._changes))

    def views(self, pixels: Pixels, drawn: Drawn, device: torch.device) -> torch.Tensor:
        """The views of a batch that were drawn, (images, 3, size, size), float32 in 0 to 1, in channels_last memory format."""
        with torch._C.DisableTorchFunctionSubclass():
            views = look_up(pixels, drawn.windows, self.geometry, device)
            for change, values in zip(self._changes, drawn.colours, strict=True):
                change.change = values.to(device)
            for lighting in self.lighting:
                views = lighting.space_fn(views, partial(compose_tfms, tfms=lighting.fs))
        return views

    @property
    def _changes(self) -> list[Any]:
        return [change for lighting in self.lighting for change in lighting.fs]

    def _crops(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Position of the square in each image, across and down: 0 at the left or top edge, 1 at the right or bottom."""
        parts = []
        for _ in range(count):
            self.crop.before_call(None, TRAINING)
            parts.append(self.crop.pcts)
        across, down = torch.tensor(parts, dtype=torch.float64).unbind(1)
        return across, down

    def _maps(self, count: int) -> torch.Tensor:
        """(count, 3, 3): the map from coordinates in the view to coordinates in the item, P A C, in float32.

        To look pixels up, each transform is needed as a map from its output to its input, so the last one applied to an
        image stands on the right. With coordinates as in Windows:

        - C, the random crop: c of the item's n pixels, beginning at pixel t, are resized to the view. The view's x is
          pixel t + (x + 1) / 2 (c - 1) of the item, that is x (c - 1) / (n - 1) + (2 t + c - 1) / (n - 1) - 1.
        - A, flip, rotation and zoom: fastai's (2, 3) matrix, with the row (0, 0, 1) below.
        - P, the perspective warp: the map that takes four corners to four corners, its eight coefficients from
          fastai's `find_coeffs` and a 1 at the end.
        """
        like = torch.empty(1, 1, 1, 1).expand(count, 3, *self.crop.size)  # for its shape only
        maps = torch.eye(3).expand(count, 3, 3)
        for affine in self.affine:  # one, of all affine transforms, or none
            affine.before_call(like, TRAINING)  # draws the random numbers
            last_row = torch.tensor([0.0, 0.0, 1.0]).expand(count, 1, 3)
            maps = torch.cat([_plain(affine.mat), last_row], dim=1)
            for warp in affine.coord_fs:
                eight = find_coeffs(_plain(warp.orig_pts), _plain(warp.targ_pts)).reshape(count, 8)
                maps = torch.cat([eight, torch.ones(count, 1)], dim=1).view(count, 3, 3) @ maps
        self.window.before_call(like, TRAINING)
        last = self.geometry.item_size - 1
        zoom = [(side - 1) / last for side in self.window.cp_size]  # (down, across), like tl
        shift = [
            (2 * corner + side - 1) / last - 1 for corner, side in zip(self.window.tl, self.window.cp_size, strict=True)
        ]
        return maps @ torch.tensor([[zoom[1], 0.0, shift[1]], [0.0, zoom[0], shift[0]], [0.0, 0.0, 1.0]])


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor) if isinstance(tensor, TensorBase) else tensor
