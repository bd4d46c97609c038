"""What a model sees of a photo here is, to the bit, what timm's own transforms make of the presized image."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from timm.data import create_transform

from breedline.images import presize_image
from breedline.preprocessing import Preprocessing, normalised, view_of_photo, view_of_presized

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocessing(**settings: object) -> Preprocessing:
    fixed = {"shorter_side": 64, "quality": 92, "input_size": 48, "mean": MEAN, "std": STD}
    return Preprocessing.model_validate(fixed | settings)


def photo(width: int, height: int, kind: str = "PNG") -> bytes:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("normal", [(MEAN, STD), ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)], ids=str)
@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (460, 613, 224),
        (32, 32, 48),
        (97, 61, 48),
        (61, 97, 48),
        (48, 48, 48),
        (48, 97, 48),
        (225, 224, 224),
        (64, 501, 33),
    ],
)
def test_the_input_is_that_of_timms_transforms_bit_for_bit(
    width: int, height: int, size: int, normal: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    mean, std = normal
    how = preprocessing(shorter_side=1000, input_size=size, mean=mean, std=std)
    presized = presize_image(photo(width, height), how.shorter_side, how.quality).data
    transform = create_transform(
        (3, size, size),
        is_training=False,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
        mean=mean,
        std=std,
    )
    theirs = transform(Image.open(io.BytesIO(presized)).convert("RGB"))
    ours = normalised(view_of_presized(presized, size)[None], how)
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    assert torch.equal(torch.from_numpy(ours[0]), theirs)


def test_a_photo_is_seen_as_its_presized_image_is() -> None:
    how, data = preprocessing(), photo(200, 150)
    presized = presize_image(data, 64, 92).data
    assert Image.open(io.BytesIO(presized)).size == (85, 64)
    assert np.array_equal(view_of_photo(data, how), view_of_presized(presized, 48))
    assert view_of_photo(data, how).shape == (48, 48, 3)


def test_what_would_be_enlarged_without_bound_is_rejected() -> None:
    assert view_of_presized(photo(60_000, 1, "JPEG"), 224).shape == (224, 224, 3)
    assert view_of_presized(photo(2_000, 1, "JPEG"), 48).shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_size", 10**9),
        ("input_size", 0),
        ("shorter_side", 10**9),
        ("quality", 101),
        ("mean", (float("nan"), 0.5, 0.5)),
        ("mean", (0.5, 0.5)),
        ("std", (0.0, 1.0, 1.0)),
        ("std", (float("inf"), 1.0, 1.0)),
        ("more", 1),
    ],
)
def test_a_value_out_of_bounds_is_refused(name: str, value: object) -> None:
    make: Callable[..., Preprocessing] = preprocessing
    with pytest.raises(ValidationError):
        make(**{name: value})
