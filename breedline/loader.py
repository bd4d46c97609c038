"""The loader: all that fastai's transforms do to the geometry of an image, as one interpolation on the device.

After fast.ai's book, chapter 5 ("presizing"): a square of each image, at random in training and in the centre
otherwise, is brought to the size of an item; then the batch is flipped, warped, turned, zoomed, cropped and brought to
the model's size. fastai does these one after the other. But each is a map of coordinates, and all of them together are
one projective map, so here each pixel of the batch is looked up once in the decoded image. fastai's own transforms
draw the random numbers, in fastai's order: equal seeds give fastai's batches, but for what its repeated interpolation
blurs.
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

from breedline.pixels import Pixels, Store, send

GEOMETRY = (IntToFloatTensor, AffineCoordTfm, RandomResizedCropGPU)
"""The batch transforms whose work a View does."""
CPU_AT_ONCE = 4
"""Images that a CPU looks up together: what it needs in between stays in its caches, which halves the time."""


class View:
    """What a batch shows of its images: a random view in training, the whole centre square otherwise."""

    def __init__(self, item_tfms: Iterable[Any], batch_tfms: Iterable[Any]) -> None:
        """Does the work of a DataBlock's transforms, but for those in `rest`."""
        batch_tfms = list(batch_tfms)
        self.crop: Resize = next(transform for transform in item_tfms if isinstance(transform, Resize))
        self.window: RandomResizedCropGPU = next(tfm for tfm in batch_tfms if isinstance(tfm, RandomResizedCropGPU))
        self.affine = next((tfm for tfm in batch_tfms if isinstance(tfm, AffineCoordTfm)), None)
        self.rest = [tfm for tfm in batch_tfms if not isinstance(tfm, GEOMETRY)]
        """What is still to be done to a batch: its light, its normalisation."""
        self.item_size, self.size = self.crop.size[0], self.window.size[0]

    def finished(self, pixels: Pixels, device: torch.device, split_idx: int) -> torch.Tensor:
        """The views of a batch, with all other transforms done, as a plain tensor."""
        views = TensorImage(self(pixels, device, split_idx))
        return Pipeline(self.rest, split_idx=split_idx)(views).as_subclass(torch.Tensor)

    def __call__(self, pixels: Pixels, device: torch.device, split_idx: int) -> torch.Tensor:
        """The views of a batch: (images, 3, size, size) float32 in 0 to 1, its memory in the order of channels_last.

        Args:
            split_idx: fastai's, 0 in training.
        """
        side = torch.minimum(pixels.height, pixels.width)
        across, down = self._crops(len(side), split_idx)
        left, top = (across * (pixels.width - side)).long(), (down * (pixels.height - side)).long()
        first = pixels.start + top * pixels.width + left
        maps = self._maps(len(side), split_idx).flatten(1)
        numbers = send(torch.cat([maps, side[:, None]], dim=1), device)
        places = send(torch.stack([first, pixels.width], dim=1), device)
        at_once = len(side) if device.type == "cuda" else CPU_AT_ONCE
        parts = zip(torch.split(numbers, at_once), torch.split(places, at_once), strict=True)
        return torch.cat([_look_up(pixels.values, *part, self.item_size, self.size) for part in parts])

    def _crops(self, count: int, split_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the square of each image lies, across and down: 0 at one end of the image, 1 at the other."""
        parts = []
        for _ in range(count):
            self.crop.before_call(None, split_idx)
            parts.append(self.crop.pcts)
        across, down = torch.tensor(parts, dtype=torch.float64).unbind(1)
        return across, down

    def _maps(self, count: int, split_idx: int) -> torch.Tensor:
        """(count, 3, 3): from the view's coordinates to the item's, both from -1 to 1 (centres of the corner pixels)."""
        like = torch.empty(1, 1, 1, 1).expand(count, 3, self.item_size, self.item_size)
        maps = torch.eye(3).expand(count, 3, 3)
        if self.affine:
            self.affine.before_call(like, split_idx)
            last_row = torch.tensor([0.0, 0.0, 1.0]).expand(count, 1, 3)
            maps = torch.cat([_plain(self.affine.mat), last_row], dim=1)
            for warp in self.affine.coord_fs if split_idx == 0 else ():
                eight = find_coeffs(_plain(warp.orig_pts), _plain(warp.targ_pts)).reshape(count, 8)
                maps = torch.cat([eight, torch.ones(count, 1)], dim=1).view(count, 3, 3) @ maps
        self.window.before_call(like, split_idx)
        last = self.item_size - 1
        zoom = [(side - 1) / last for side in self.window.cp_size]
        shift = [
            (2 * corner + side - 1) / last - 1 for corner, side in zip(self.window.tl, self.window.cp_size, strict=True)
        ]
        return maps @ torch.tensor([[zoom[1], 0.0, shift[1]], [0.0, zoom[0], shift[0]], [0.0, 0.0, 1.0]])


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor) if isinstance(tensor, TensorBase) else tensor


def _look_up(
    values: torch.Tensor, numbers: torch.Tensor, places: torch.Tensor, item_size: int, size: int
) -> torch.Tensor:
    """Bilinear interpolation of each view's pixels in its image.

    Args:
        numbers: (images, 10) float32: the nine of the map, and the side of the square in pixels.
        places: (images, 2) int64: the square's first pixel, and the width of the image.
    """
    maps, side = numbers[:, :9, None, None].unbind(1), numbers[:, 9, None, None]
    first, width = places[:, :, None, None].unbind(1)
    across = torch.linspace(-1, 1, size, device=values.device)
    down = across[:, None]
    # by hand and not as a product of matrices, which a GPU may round to TF32
    depth = maps[6] * across + (maps[7] * down + maps[8])

    def lines(row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The two lines of the image on either side of each point, and how far it is from the first."""
        at = (maps[row] * across + (maps[row + 1] * down + maps[row + 2])) / depth
        at = 1 - ((at + 1) % 4 - 2).abs()  # mirrored at the item's edges, as often as it takes
        at = ((at + 1) * ((item_size - 1) / 2) + 0.5) * (side / item_size) - 0.5
        at = torch.minimum(at.clamp_(min=0), side - 1)
        line = at.floor()
        return line.long(), torch.minimum(line + 1, side - 1).long(), (at - line)[..., None]

    left, right, x = lines(0)
    upper, lower, y = lines(3)
    upper, lower = first + upper * width, first + lower * width

    def colours(pixel: torch.Tensor) -> torch.Tensor:
        return values[pixel].view(torch.uint8).view(*pixel.shape, 4)[..., :3].float()

    above = torch.lerp(colours(upper + left), colours(upper + right), x)
    below = torch.lerp(colours(lower + left), colours(lower + right), x)
    return torch.lerp(above, below, y).div_(255).permute(0, 3, 1, 2)


class PixelsDL(TfmdDL):
    """A fastai loader whose images come from a Store and are seen through a View; other batch transforms follow.

    It takes the place of TfmdDL: `block.dataloaders(items, dl_type=PixelsDL, store=store)`.
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
        """A loader of the same kind; fastai makes one for each further split and for images to predict."""
        return super().new(dataset, cls, **{"store": self.store, "view": self.view, **kwargs})

    def create_batches(self, samps: Iterable[int]) -> Iterator[tuple[torch.Tensor, ...]]:
        """Views and class numbers, on the device."""
        chunks, again = tee(self.chunkify(samps))
        items = self.dataset.items
        fetched = self.store.batches([items[row] for row in chunk] for chunk in chunks)
        for chunk, pixels in zip(again, fetched, strict=True):
            views = self.view(pixels, self.device, self.dataset.split_idx)
            yield TensorImage(views), *(send(column[chunk], self.device) for column in self._columns())

    def _columns(self) -> list[torch.Tensor]:
        """What the dataset has beside the image: the class numbers, unless it has none."""
        if self._targets is None:
            rows = range(len(self.dataset))
            self._targets = [torch.stack([column[row] for row in rows]) for column in self.dataset.tls[1:]]
        return self._targets
