"""The data loader: all geometric transforms of fastai as one interpolation per batch, on the device.

After fast.ai's book, chapter 5 ("presizing"): a square of each image (random in training, else central) is resized to
the item size; then the batch is flipped, warped, rotated, zoomed, cropped and resized to the model's input. fastai
interpolates after each group of these. But each is a projective map of coordinates, and so is their product: here each
pixel of a batch is looked up once in the decoded image. The random numbers come from fastai's own transforms, in
fastai's order, so that equal seeds give fastai's batches, except for the blur of repeated interpolation.
"""

from collections.abc import Iterable, Iterator
from itertools import tee
from typing import Any

import torch
from fastai.data.core import TfmdDL
from fastai.data.transforms import IntToFloatTensor
from fastai.torch_core import TensorBase
from fastai.vision.augment import AffineCoordTfm, RandomResizedCropGPU, Resize, find_coeffs
from fastai.vision.core import TensorCategory, TensorImage
from fasttransform import Pipeline

from breedline.pixels import Pixels, Store, to_device

GEOMETRY = (IntToFloatTensor, AffineCoordTfm, RandomResizedCropGPU)
"""The batch transforms that a View replaces."""
CPU_CHUNK = 4
"""Images that a CPU interpolates at a time: their temporaries fit in its caches, which halves the time."""


class View:
    """The part of each image that a batch shows: a random view in training, otherwise the whole central square."""

    def __init__(self, item_tfms: Iterable[Any], batch_tfms: Iterable[Any]) -> None:
        """Replaces the transforms of a DataBlock, except those in `rest`."""
        batch_tfms = list(batch_tfms)
        self.crop: Resize = next(transform for transform in item_tfms if isinstance(transform, Resize))
        self.window: RandomResizedCropGPU = next(tfm for tfm in batch_tfms if isinstance(tfm, RandomResizedCropGPU))
        self.affine = next((tfm for tfm in batch_tfms if isinstance(tfm, AffineCoordTfm)), None)
        self.rest = [tfm for tfm in batch_tfms if not isinstance(tfm, GEOMETRY)]
        """The batch transforms still to apply: lighting and normalisation."""
        self.item_size, self.size = self.crop.size[0], self.window.size[0]

    def finished(self, pixels: Pixels, device: torch.device, split_idx: int) -> torch.Tensor:
        """The views of a batch with the transforms in `rest` applied, as a plain tensor."""
        views = TensorImage(self(pixels, device, split_idx))
        return Pipeline(self.rest, split_idx=split_idx)(views).as_subclass(torch.Tensor)

    def __call__(self, pixels: Pixels, device: torch.device, split_idx: int) -> torch.Tensor:
        """The views of a batch: (images, 3, size, size), float32 in 0 to 1, in channels_last memory format.

        Args:
            split_idx: fastai's number of the split: 0 is training, and gives random views.
        """
        side = torch.minimum(pixels.height, pixels.width)
        across, down = self._crops(len(side), split_idx)
        left, top = (across * (pixels.width - side)).long(), (down * (pixels.height - side)).long()
        first = pixels.start + top * pixels.width + left
        maps = self._maps(len(side), split_idx).flatten(1)
        numbers = to_device(torch.cat([maps, side[:, None]], dim=1), device)
        places = to_device(torch.stack([first, pixels.width], dim=1), device)
        chunk = len(side) if device.type == "cuda" else CPU_CHUNK
        parts = zip(torch.split(numbers, chunk), torch.split(places, chunk), strict=True)
        return torch.cat([_look_up(pixels.values, *part, self.item_size, self.size) for part in parts])

    def _crops(self, count: int, split_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Position of the square in each image, across and down: 0 at the left or top edge, 1 at the right or bottom."""
        parts = []
        for _ in range(count):
            self.crop.before_call(None, split_idx)
            parts.append(self.crop.pcts)
        across, down = torch.tensor(parts, dtype=torch.float64).unbind(1)
        return across, down

    def _maps(self, count: int, split_idx: int) -> torch.Tensor:
        """(count, 3, 3): the map from coordinates in the view to coordinates in the item, P A C, in float32.

        Coordinates are homogeneous columns (x, y, 1) with x and y in -1 to 1, the centres of the corner pixels
        (grid_sample's align_corners=True, as in fastai). To look pixels up, each transform is needed as a map from its
        output to its input, so the last one applied to an image stands on the right:

        - C, the random crop: c of the item's n pixels, beginning at pixel t, are resized to the view. The view's x is
          pixel t + (x + 1) / 2 (c - 1) of the item, that is x (c - 1) / (n - 1) + (2 t + c - 1) / (n - 1) - 1.
        - A, flip, rotation and zoom: fastai's (2, 3) matrix, with the row (0, 0, 1) below.
        - P, the perspective warp: the map that takes four corners to four corners, its eight coefficients from
          fastai's `find_coeffs` and a 1 at the end.
        """
        like = torch.empty(1, 1, 1, 1).expand(count, 3, self.item_size, self.item_size)  # for its shape only
        maps = torch.eye(3).expand(count, 3, 3)
        if self.affine:
            self.affine.before_call(like, split_idx)  # draws the random numbers
            last_row = torch.tensor([0.0, 0.0, 1.0]).expand(count, 1, 3)
            maps = torch.cat([_plain(self.affine.mat), last_row], dim=1)
            for warp in self.affine.coord_fs if split_idx == 0 else ():
                eight = find_coeffs(_plain(warp.orig_pts), _plain(warp.targ_pts)).reshape(count, 8)
                maps = torch.cat([eight, torch.ones(count, 1)], dim=1).view(count, 3, 3) @ maps
        self.window.before_call(like, split_idx)
        last = self.item_size - 1
        zoom = [(side - 1) / last for side in self.window.cp_size]  # (down, across), like tl
        shift = [
            (2 * corner + side - 1) / last - 1 for corner, side in zip(self.window.tl, self.window.cp_size, strict=True)
        ]
        return maps @ torch.tensor([[zoom[1], 0.0, shift[1]], [0.0, zoom[0], shift[0]], [0.0, 0.0, 1.0]])


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor) if isinstance(tensor, TensorBase) else tensor


def _look_up(
    values: torch.Tensor, numbers: torch.Tensor, places: torch.Tensor, item_size: int, size: int
) -> torch.Tensor:
    """The views of some images, (images, 3, size, size) in 0 to 1, each pixel interpolated once from its image.

    For the pixel (x, y) of a view, x and y from -1 to 1, and the map M (3, 3) of its image:

    1. Point in the item: X = (M00 x + M01 y + M02) / w and Y = (M10 x + M11 y + M12) / w, w = M20 x + M21 y + M22.
    2. A point outside -1 to 1 is reflected at the edges, as often as it takes: X -> 1 - |((X + 1) mod 4) - 2|.
    3. Pixel in the item, q = (X + 1) (item_size - 1) / 2. The item is a square of `side` pixels of the image, resized
       by side / item_size around the pixels' outer edges: in the square it is (q + 1/2) side / item_size - 1/2.
    4. Bilinear interpolation of the four pixels around that point; at the edge of the square, its last pixel counts twice.

    All of it is computed for all pixels of all images at once, with shape (images, size, size).

    Args:
        values: (pixels,) int32: the four bytes R, G, B, X of each pixel of every image, end to end.
        numbers: (images, 10) float32: the nine entries of M, row by row, and `side`.
        places: (images, 2) int64: index in `values` of the square's first pixel, and the width of the image.
    """
    maps, side = numbers[:, :9, None, None].unbind(1), numbers[:, 9, None, None]  # each (images, 1, 1)
    first, width = places[:, :, None, None].unbind(1)
    across = torch.linspace(-1, 1, size, device=values.device)
    down = across[:, None]
    # written out, since a GPU may round a matrix product to TF32: ten bits, too few for a pixel's position
    w = maps[6] * across + (maps[7] * down + maps[8])

    def neighbours(row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For one axis (`row` 0 or 3 of the flat M): indices of the two pixels around each point, and its distance
        from the first, with an axis added for the colours."""
        at = (maps[row] * across + (maps[row + 1] * down + maps[row + 2])) / w
        at = 1 - ((at + 1) % 4 - 2).abs()
        at = ((at + 1) * ((item_size - 1) / 2) + 0.5) * (side / item_size) - 0.5
        at = torch.minimum(at.clamp_(min=0), side - 1)
        index = at.floor()
        return index.long(), torch.minimum(index + 1, side - 1).long(), (at - index)[..., None]

    left, right, x = neighbours(0)
    upper, lower, y = neighbours(3)
    upper, lower = first + upper * width, first + lower * width

    def colours(pixel: torch.Tensor) -> torch.Tensor:
        """(images, size, size, 3) float32 in 0 to 255: one int32 is read per pixel, then seen as four bytes."""
        return values[pixel].view(torch.uint8).view(*pixel.shape, 4)[..., :3].float()

    above = torch.lerp(colours(upper + left), colours(upper + right), x)
    below = torch.lerp(colours(lower + left), colours(lower + right), x)
    return torch.lerp(above, below, y).div_(255).permute(0, 3, 1, 2)


class PixelsDL(TfmdDL):
    """A fastai data loader that takes images from a Store and shows them through a View; other batch transforms follow.

    Used in place of TfmdDL: `block.dataloaders(items, dl_type=PixelsDL, store=store)`.
    """

    def __init__(self, dataset: Any, store: Store, view: View | None = None, **kwargs: Any) -> None:
        if view is None or any(isinstance(tfm, GEOMETRY) for tfm in kwargs["after_batch"]):  # a DataBlock's transforms
            view = View(kwargs["after_item"], kwargs["after_batch"])
            kwargs["after_batch"] = view.rest
        self.store, self.view = store, view
        super().__init__(dataset, **{**kwargs, "num_workers": 0})
        self._n_inp, self._types = 1, {tuple: [TensorImage, TensorCategory]}
        self._targets: list[torch.Tensor] | None = None

    def new(self, dataset: Any = None, cls: Any = None, **kwargs: Any) -> "PixelsDL":
        """A loader of the same kind, as fastai creates for each further split and for images to predict."""
        return super().new(dataset, cls, **{"store": self.store, "view": self.view, **kwargs})

    def create_batches(self, samps: Iterable[int]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Views and class indices, on the device."""
        chunks, again = tee(self.chunkify(samps))
        items = self.dataset.items
        fetched = self.store.batches([items[row] for row in chunk] for chunk in chunks)
        for chunk, pixels in zip(again, fetched, strict=True):
            views = self.view(pixels, self.device, self.dataset.split_idx)
            yield TensorImage(views), *(to_device(column[chunk], self.device) for column in self._columns())

    def _columns(self) -> list[torch.Tensor]:
        """The dataset's columns beside the images: class indices, or nothing for images to predict."""
        if self._targets is None:
            rows = range(len(self.dataset))
            self._targets = [torch.stack([column[row] for row in rows]) for column in self.dataset.tls[1:]]
        return self._targets
