"""What the model sees of an image in training: each pixel is interpolated once, from the decoded image, on the device.

After fast.ai's book, chapter 5 ("presizing"): a square of the image is resized to the item size; then a part of it, or
all, becomes the model's input. Both are projective maps of coordinates, and so is their product. augment.py has the
random views; what is measured and predicted has seen the central square, as preprocessing.py makes it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from breedline.pixels import Pixels, to_device

CPU_CHUNK = 4
"""Images that a CPU interpolates at a time: their temporaries fit in its caches, which halves the time."""


@dataclass(frozen=True)
class Geometry:
    """What the model sees of an image."""

    item_size: int
    """Pixels of the square cropped from a presized image."""
    size: int
    """Pixels of the square that the model takes."""
    mean: tuple[float, ...]
    """Per channel, in 0 to 1; what normalisation subtracts."""
    std: tuple[float, ...]
    """What it divides by."""

    @property
    def max_side(self) -> int:
        """See `max_side`."""
        return max_side(self.item_size, self.size)


def max_side(item_size: int, size: int) -> int:
    """The longest shorter side, in pixels, that a decoded image needs.

    Bilinear interpolation reads four pixels per output pixel: of an image more than twice as large it would skip some.
    fastai's transforms first reduce such images to twice the size, too.
    """
    return min(item_size, 2 * size)


class Windows(NamedTuple):
    """Which part of each image a batch shows."""

    across: torch.Tensor
    """(images,) float64: where the square lies in the image, 0 at its left edge, 1 at its right edge."""
    down: torch.Tensor
    """(images,) float64: the same from the upper edge, 0, to the lower one, 1."""
    maps: torch.Tensor
    """(images, 3, 3) float32: the map from coordinates in the view to coordinates in the square.

    Coordinates are homogeneous columns (x, y, 1) with x and y in -1 to 1, the centres of the corner pixels
    (grid_sample's align_corners=True, as in fastai).
    """


def normalised(squares: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """The model's input for squares (images, size, size, 3) of bytes: (images, 3, size, size) float32, channels_last."""
    values = (geometry.mean, geometry.std)
    mean, std = (to_device(torch.tensor(numbers)[:, None, None], squares.device) for numbers in values)
    return (squares.permute(0, 3, 1, 2).float() / 255 - mean) / std


def look_up(pixels: Pixels, windows: Windows, geometry: Geometry, device: torch.device) -> torch.Tensor:
    """What the windows show: (images, 3, size, size), float32 in 0 to 1, in channels_last memory format."""
    side = torch.minimum(pixels.height, pixels.width)
    left, top = (windows.across * (pixels.width - side)).long(), (windows.down * (pixels.height - side)).long()
    first = pixels.start + top * pixels.width + left
    numbers = to_device(torch.cat([windows.maps.flatten(1), side[:, None]], dim=1), device)
    places = to_device(torch.stack([first, pixels.width], dim=1), device)
    chunk = len(side) if device.type == "cuda" else CPU_CHUNK
    parts = zip(torch.split(numbers, chunk), torch.split(places, chunk), strict=True)
    return torch.cat([_look_up(pixels.values, *part, geometry.item_size, geometry.size) for part in parts])


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
