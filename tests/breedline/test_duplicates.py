import hashlib
import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

import breedline.duplicates
from breedline.duplicates import MAX_DISTANCE, SIDE, Sketch, leaders, sketch

SIMILARITY = 0.9


def photo(number: int, size: tuple[int, int] = (200, 150)) -> Image.Image:
    """Soft shapes, as a photo has, that differ for each number."""
    noise = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype="uint8")
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def sketched(*pictures: Image.Image) -> list[Sketch]:
    found = [sketch(picture) for picture in pictures]
    assert None not in found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    "edit",
    [
        lambda picture: encoded(picture, 90),
        lambda picture: encoded(picture, 50),
        lambda picture: ImageOps.scale(picture, 0.5),
        lambda picture: ImageOps.scale(picture, 0.9),
        lambda picture: ImageOps.fit(picture, picture.size, bleed=0.01),
        lambda picture: ImageEnhance.Brightness(picture).enhance(1.1),
        lambda picture: ImageEnhance.Brightness(picture).enhance(0.9),
        ImageOps.grayscale,
    ],
)
def test_an_edited_copy_joins_its_photo(edit: Callable[[Image.Image], Image.Image]) -> None:
    photos = [photo(number) for number in range(8)]
    found = leaders(sketched(*photos, *map(edit, photos)), SIMILARITY)
    assert found.tolist() == [*range(8), *range(8)]


@pytest.mark.parametrize(
    "edit",
    [ImageOps.mirror, ImageOps.flip, ImageOps.invert, lambda picture: ImageOps.fit(picture, (200, 150), bleed=0.1)],
)
def test_a_mirrored_or_much_cropped_copy_is_another_image(edit: Callable[[Image.Image], Image.Image]) -> None:
    assert leaders(sketched(photo(1), edit(photo(1))), SIMILARITY).tolist() == [0, 1]


@pytest.mark.parametrize("shade", [0, 128, 250])
def test_an_image_without_detail_has_no_sketch(shade: int) -> None:
    noise = np.random.default_rng(1).integers(0, 5, (40, 40, 3), dtype="uint8")
    assert sketch(Image.fromarray(shade + noise)) is None


def test_the_sketch_does_not_change_between_versions() -> None:
    # with another hash, groups could change, and with them the split
    found = sketch(photo(1))
    assert found is not None
    assert f"{found.hash:016x} {hashlib.sha256(found.thumbnail).hexdigest():.16}" == "8ce3d8b83acbc534 c47c9f479c8cb618"


def like(base: int, changed: int = 0, shift: int = 0) -> Sketch:
    """A sketch of base picture `base`, with so many bits of its hash flipped, and some of its grey values replaced."""
    grey = np.random.default_rng(base).integers(0, 256, SIDE * SIDE, dtype="uint8")
    grey[:shift] = np.random.default_rng(base + 1000).integers(0, 256, shift, dtype="uint8")
    return Sketch(int(np.random.default_rng(base).integers(0, 2**63)) ^ ((1 << changed) - 1), grey.tobytes())


def test_both_the_hash_and_the_grey_values_must_be_alike() -> None:
    def joins(other: Sketch) -> bool:
        return leaders([like(1), other], SIMILARITY).tolist() == [0, 0]

    assert joins(like(1, changed=MAX_DISTANCE))
    assert not joins(like(1, changed=MAX_DISTANCE + 1))
    assert joins(like(1, shift=10))
    assert not joins(like(1, shift=100))
    assert leaders([like(1), like(1, shift=10)], 1.0).tolist() == [0, 1]
    assert leaders([like(1), like(1)], 1.0).tolist() == [0, 0]


def test_an_image_that_resembles_two_groups_joins_the_earlier_and_they_stay() -> None:
    first, second, between = like(1), like(1, shift=30), like(1, shift=15)
    assert leaders([first, second], SIMILARITY).tolist() == [0, 1]
    assert leaders([first, second, between], SIMILARITY).tolist() == [0, 1, 0]
    assert leaders([second, first, between], SIMILARITY).tolist() == [0, 1, 0]


def test_a_series_that_changes_slowly_is_no_endless_chain() -> None:
    found = leaders([like(1, shift=10 * step) for step in range(20)], SIMILARITY)
    assert len(set(found)) > 3


series = st.lists(
    st.builds(like, st.integers(0, 3), st.integers(0, 16), st.sampled_from([0, 10, 20, 30, 60])), max_size=30
)


@given(images=series, more=series)
def test_images_that_come_later_change_no_group(images: list[Sketch], more: list[Sketch]) -> None:
    before = leaders(images, SIMILARITY)
    after = leaders([*images, *more], SIMILARITY)
    assert after[: len(images)].tolist() == before.tolist()
    assert (after[after] == after).all()  # a leader has no other leader
    assert (after <= np.arange(len(after))).all()


def test_an_image_is_compared_with_a_bounded_number_of_leaders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breedline.duplicates, "MAX_CANDIDATES", 5)
    alike_in_hash = [Sketch(0, like(base).thumbnail) for base in range(9)]
    found = leaders([*alike_in_hash, alike_in_hash[4], alike_in_hash[5]], SIMILARITY)
    assert found.tolist() == [*range(9), 4, 10]


def test_the_correlation_is_pearsons() -> None:
    grey = np.random.default_rng(1).integers(0, 256, (5, SIDE * SIDE), dtype="uint8")
    expected = np.corrcoef(grey.astype(float))[0]
    np.testing.assert_allclose(breedline.duplicates._correlation(grey, grey[0]), expected, atol=1e-12)


def test_no_images_have_no_leaders() -> None:
    assert leaders([], SIMILARITY).tolist() == []
