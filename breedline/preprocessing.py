"""What a model sees of a photo, from the bytes of its file to normalised numbers; with Pillow and numpy alone.

The photo is presized as the pipeline's own images are (images.py); then comes what timm and torchvision call Resize,
CenterCrop, ToTensor and Normalize, to the bit, so that they get from a presized image what is computed here.
"""

import io
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from breedline.formats import FORMATS
from breedline.images import LARGE_MEMORY, presize_image

Mean = Annotated[float, Field(ge=0, le=1)]
Std = Annotated[float, Field(ge=0.001, le=1000)]
INTERPOLATION = Image.Resampling.BICUBIC
"""What nearly all of timm's models were pretrained with."""
LARGEST = LARGE_MEMORY // 4
"""Pixels. Where a long and narrow image would have more when its shorter side has the model's size, only its middle is resized."""


class Preprocessing(BaseModel):
    """From a photo to the model's input. Its bounds hold for bundles of any origin."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shorter_side: int = Field(gt=0, le=16384)
    """Pixels that a photo's shorter side is reduced to first (presize.shorter_side)."""
    quality: int = Field(ge=1, le=100)
    """Quality of the JPEG that it then is (presize.quality)."""
    input_size: int = Field(gt=0, le=4096)
    """Pixels of the square that the model takes."""
    mean: tuple[Mean, Mean, Mean]
    """Per channel, in 0 to 1; what normalisation subtracts."""
    std: tuple[Std, Std, Std]
    """What it divides by."""


def view_of_photo(data: bytes, how: Preprocessing) -> np.ndarray:
    """What the model sees of an image file of any kind: (size, size, 3) bytes. Raises Undecodable as `presize_image` does."""
    return view_of_presized(presize_image(data, how.shorter_side, how.quality).data, how.input_size)


def view_of_presized(jpeg: bytes, size: int) -> np.ndarray:
    """What the model sees of a presized image: its central square, reduced or enlarged, (size, size, 3) bytes."""
    picture = decoded(jpeg)
    short = min(picture.size)
    target = (int(size * picture.width / short), int(size * picture.height / short))
    if target[0] * target[1] > LARGEST:
        picture, target = _central(picture, short), (size, size)
    if target != picture.size:
        picture = picture.resize(target, INTERPOLATION)
    return np.asarray(_central(picture, size))


def decoded(data: bytes) -> Image.Image:
    """An image file of any kind in RGB, not upright."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy what is RGB already


def _central(picture: Image.Image, size: int) -> Image.Image:
    left, top = round((picture.width - size) / 2), round((picture.height - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def normalised(views: np.ndarray, how: Preprocessing) -> np.ndarray:
    """The model's input for views (images, size, size, 3): (images, 3, size, size) float32."""
    # a byte has 256 values, so looking them up takes a quarter of the time of computing each pixel's
    shades = np.arange(256, dtype=np.float32) / np.float32(255)
    found = np.empty((len(views), 3, *views.shape[1:3]), np.float32)
    for channel, (mean, std) in enumerate(zip(how.mean, how.std, strict=True)):
        found[:, channel] = ((shades - np.float32(mean)) / np.float32(std))[views[..., channel]]
    return found
