import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin, features

from breedline.images import ENCODED, KEPT, MAX_PIXELS, RESIZED, Presized, Undecodable, presize_image

WIDE = (64, 48)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
"""Pillow warns of what it goes on to read; the stage ignores that as well."""


def waves(size: tuple[int, int] = WIDE) -> Image.Image:
    """Soft, coloured and without any symmetry, so that a turned or mirrored one is told from it."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / max(size)
    channels = [200 * x + 30, 120 + 100 * np.sin(5 * y + 2 * x), 220 - 180 * y]
    return Image.fromarray(np.stack(channels, 2).clip(0, 255).astype("uint8"))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(presized: Presized) -> Image.Image:
    image = Image.open(io.BytesIO(presized.data))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    assert image.size == (presized.width, presized.height)
    assert not image.getexif()
    return image


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean, over pixels and channels, in steps of 256."""
    assert one.size == other.size
    return float(np.abs(np.asarray(one, "float32") - np.asarray(other.convert("RGB"), "float32")).mean())


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


# --- what passes through ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"subsampling": 0, "quality": 100}, {"exif": orientation(1)}, {"exif": orientation(9)}],
)
def test_a_small_upright_rgb_jpeg_passes_byte_for_byte(options: dict[str, Any]) -> None:
    data = encode(waves(), "JPEG", **options)
    assert presize_image(data, 48, 92) == Presized(data, 48, 64, KEPT)


@pytest.mark.parametrize(("kind", "made"), [("JPEG", KEPT), ("PNG", ENCODED), ("WEBP", ENCODED)])
def test_metadata_that_cannot_be_read_does_not_condemn_the_pixels(kind: str, made: str) -> None:
    data = encode(waves(), kind, exif=b"Exif\0\0Not a TIFF header", dpi=(72, 72))
    assert presize_image(data, 48, 92).made == made
    assert presize_image(data, 24, 92).made == RESIZED


# --- what is converted -----------------------------------------------------------------------------------------------


def sixteen_bits() -> Image.Image:
    grey = np.asarray(waves().convert("L")).astype("uint16")
    return Image.fromarray(grey * 256 + 255)


def half_hidden(mode: str) -> Image.Image:
    """Left half transparent, over a colour that nobody is meant to see."""
    image = waves().convert(mode)
    alpha = np.full((WIDE[1], WIDE[0]), 255, "uint8")
    alpha[:, : WIDE[0] // 2] = 0
    image.putalpha(Image.fromarray(alpha))
    return image


def left_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    image.paste("white", (0, 0, WIDE[0] // 2, WIDE[1]))
    return image


def dark_transparent_palette() -> Image.Image:
    image = Image.new("P", WIDE, 0)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.paste(1, (WIDE[0] // 2, 0, *WIDE))
    return image


GREY = waves().convert("L").convert("RGB")
ONE_BIT = waves().convert("1")
PALETTE = waves().convert("P", palette=Image.Palette.ADAPTIVE)
CONVERTED = {
    "cmyk jpeg": (encode(waves().convert("CMYK"), "JPEG", quality=95), waves()),
    "grey jpeg": (encode(waves().convert("L"), "JPEG", quality=95), GREY),
    "png": (encode(waves(), "PNG"), waves()),
    "1 bit png": (encode(ONE_BIT, "PNG"), ONE_BIT),
    "1 bit tiff": (encode(ONE_BIT, "TIFF", compression="group4"), ONE_BIT),
    "palette png": (encode(PALETTE, "PNG"), PALETTE),
    "16 bit png": (encode(sixteen_bits(), "PNG"), GREY),
    "16 bit tiff": (encode(sixteen_bits(), "TIFF"), GREY),
    "rgba png": (encode(half_hidden("RGB"), "PNG"), left_white(waves())),
    "rgba webp": (encode(half_hidden("RGB"), "WEBP", lossless=True, exact=True), left_white(waves())),
    "rgba tiff": (encode(half_hidden("RGB"), "TIFF"), left_white(waves())),
    "la png": (encode(half_hidden("L"), "PNG"), left_white(GREY)),
    "transparent palette png": (
        encode(dark_transparent_palette(), "PNG", transparency=0),
        left_white(dark_transparent_palette()),
    ),
    "transparent palette gif": (
        encode(dark_transparent_palette(), "GIF", transparency=0),
        left_white(dark_transparent_palette()),
    ),
    "rgb png with a transparent colour": (
        encode(left_white(waves()).point(lambda value: value % 255), "PNG", transparency=(0, 0, 0)),
        left_white(waves()),
    ),
    "gif": (encode(PALETTE, "GIF"), PALETTE),
    "bmp": (encode(waves(), "BMP"), waves()),
    "webp": (encode(waves(), "WEBP", quality=95), waves()),
    "tiff": (encode(waves(), "TIFF", compression="tiff_lzw"), waves()),
    "jpeg tiff": (encode(waves(), "TIFF", compression="jpeg", quality=95), waves()),
    "lab tiff": (encode(waves().convert("LAB"), "TIFF"), waves()),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_anything_else_becomes_an_rgb_jpeg_that_looks_the_same(kind: str) -> None:
    data, expected = CONVERTED[kind]
    presized = presize_image(data, 48, 95)
    assert presized.made == ENCODED
    assert difference(decode(presized), expected) < 3.5


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_the_upper_eight(kind: str) -> None:
    flat = {value: Image.fromarray(np.full((8, 8), value, "uint16")) for value in (0, 255, 256, 32767, 40000, 65535)}
    found = {v: decode(presize_image(encode(i, kind), 8, 95)).getpixel((4, 4)) for v, i in flat.items()}
    assert found == {value: (value >> 8,) * 3 for value in flat}


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    first, second = Image.new("RGB", WIDE, (200, 30, 30)), Image.new("RGB", WIDE, (30, 30, 200))
    presized = presize_image(encode(first, kind, save_all=True, append_images=[second]), 48, 95)
    assert presized.made == ENCODED
    assert difference(decode(presized), first) < 3.5


def test_what_was_small_keeps_its_colours_in_full_and_what_is_reduced_need_not() -> None:
    small, large = (decode(presize_image(encode(waves(), "PNG"), size, 92)) for size in (48, 24))
    assert [JpegImagePlugin.get_sampling(image) for image in (small, large)] == [0, 2]


def test_a_comment_that_no_jpeg_can_hold_is_left_behind() -> None:
    presized = presize_image(encode(PALETTE, "GIF", comment=b"x" * 70_000), 48, 92)
    assert "comment" not in decode(presized).info


# --- what is turned --------------------------------------------------------------------------------------------------


def as_stored(upright: np.ndarray, value: int) -> np.ndarray:
    """As the EXIF standard puts it: which side of the picture the stored row 0 and column 0 are."""
    turned = upright.transpose(1, 0, 2)
    return {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: turned,  # left, top
        6: turned[::-1],  # right, top
        7: turned[::-1, ::-1],  # right, bottom
        8: turned[:, ::-1],  # left, bottom
    }[value]


@pytest.mark.parametrize("size", [48, 24])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation_comes_out_upright(kind: str, value: int, size: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(as_stored(np.asarray(waves()), value)))
    presized = presize_image(encode(stored, kind, exif=orientation(value), quality=95), size, 95)
    expected = waves() if size == 48 else waves().resize((32, 24), Image.Resampling.LANCZOS)
    image = Image.open(io.BytesIO(presized.data))
    assert image.getexif().get(0x0112, 1) == 1
    assert difference(image, expected) < 3.5
    assert presized[1:3] == (size, size * 4 // 3)


# --- what is reduced -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 375), (375, 501), (1001, 333), (334, 2000), (333, 334), (3000, 2000)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_shorter_side_is_exact_and_the_shape_is_kept(kind: str, size: tuple[int, int]) -> None:
    presized = presize_image(encode(waves(size), kind), 332, 90)
    assert presized.made == RESIZED
    assert min(decode(presized).size) == 332
    assert presized.width / presized.height == pytest.approx(size[0] / size[1], abs=1 / 332)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 300)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_nothing_is_enlarged(kind: str, size: tuple[int, int]) -> None:
    assert decode(presize_image(encode(waves(size), kind), 300, 90)).size == size


@pytest.mark.parametrize("size", [(2400, 1800), (1300, 1950), (4000, 1000)])
def test_the_quick_way_to_reduce_a_large_jpeg_is_as_good_as_the_long_way(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).normal(0, 40, (size[1] // 4, size[0] // 4, 3))
    detail = Image.fromarray((128 + noise).clip(0, 255).astype("uint8")).resize(size, Image.Resampling.BICUBIC)
    data = encode(Image.blend(waves(size), detail, 0.5), "JPEG", quality=95)
    quick = decode(presize_image(data, 256, 95))
    full = Image.open(io.BytesIO(data)).resize(quick.size, Image.Resampling.LANCZOS)
    slow = Image.open(io.BytesIO(encode(full, "JPEG", quality=95, subsampling=2)))
    error = np.mean((np.asarray(quick, "float64") - np.asarray(slow, "float64")) ** 2)
    assert error <= 255**2 / 10**4  # a PSNR of 40 dB


# --- what is rejected ------------------------------------------------------------------------------------------------


def reason(data: bytes, size: int = 48) -> str:
    with pytest.raises(Undecodable) as caught:
        presize_image(data, size, 92)
    return str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff",
        b"<html>not found</html>",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
        encode(waves(), "PPM"),
        encode(waves(), "EPS"),
        encode(waves(), "ICO"),
        encode(waves(), "JPEG2000"),
    ],
)
def test_other_formats_are_rejected_for_a_reason_that_is_the_same_each_time(data: bytes) -> None:
    assert reason(data) == "not a whole JPEG, PNG, GIF, BMP, WEBP or TIFF"


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_white_are_rejected(mode: str) -> None:
    assert reason(encode(waves().convert(mode), "TIFF")) == "32 bits a channel, in which no value is known to be white"


def png_of(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be large."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(99))),
        (b"IEND", b""),
    ]
    packed = (struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def gif_of(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + encode(PALETTE, "GIF")[13:]


@pytest.mark.parametrize("data", [png_of(10_000, 10_000), png_of(2**31 - 1, 2**31 - 1), gif_of(65535, 65535)])
def test_bombs_are_rejected_by_their_claim(data: bytes) -> None:
    assert reason(data) == f"over {MAX_PIXELS} pixels"


def test_no_width_no_image() -> None:
    assert reason(png_of(0, 9)).startswith("not a whole")


def test_an_image_too_long_for_a_jpeg_is_rejected() -> None:
    assert reason(encode(Image.new("L", (70_000, 2)), "PNG"))


def kinds() -> dict[str, bytes]:
    """One file of each kind that has a decoder, or a way through it, of its own."""
    image, exif = waves(), orientation(6)
    two = {"save_all": True, "append_images": [image.rotate(90)]}
    return {
        "jpeg": encode(image, "JPEG"),
        "progressive jpeg": encode(image, "JPEG", progressive=True),
        "turned jpeg": encode(image, "JPEG", exif=exif),
        "cmyk jpeg": encode(image.convert("CMYK"), "JPEG"),
        "mpo": encode(image, "MPO", **two),
        "png": encode(image, "PNG", exif=exif),
        "palette png": encode(PALETTE, "PNG", transparency=0),
        "16 bit png": encode(sixteen_bits(), "PNG"),
        "gif": encode(image, "GIF", **two),
        "bmp": encode(image, "BMP"),
        "webp": encode(image, "WEBP", exif=exif),
        "animated webp": encode(image, "WEBP", lossless=True, **two),
        "tiff": encode(image, "TIFF", exif=exif),
        "lzw tiff": encode(half_hidden("RGB"), "TIFF", compression="tiff_lzw"),
        "jpeg tiff": encode(image, "TIFF", compression="jpeg"),
        "fax tiff": encode(ONE_BIT, "TIFF", compression="group4"),
        "lab tiff": encode(image.convert("LAB"), "TIFF"),
    }


KINDS = kinds()
FIRST_FRAME_ONLY = {"mpo", "gif"}
"""Here the first frame is whole long before the file is."""


@pytest.mark.parametrize("size", [48, 24])
@pytest.mark.parametrize("kind", ["jpeg", "progressive jpeg", "turned jpeg", "cmyk jpeg"])
def test_a_jpeg_cut_anywhere_is_rejected(kind: str, size: int) -> None:
    for length in range(len(KINDS[kind])):
        reason(KINDS[kind][:length], size)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - FIRST_FRAME_ONLY))
def test_a_file_cut_in_its_pixels_is_rejected(kind: str) -> None:
    data = KINDS[kind]
    for length in range(0, len(data) - 24, max(1, len(data) // 150)):
        reason(data[:length])


@pytest.mark.parametrize("kind", sorted(FIRST_FRAME_ONLY))
def test_a_file_cut_in_its_first_frame_is_rejected(kind: str) -> None:
    for length in range(0, len(KINDS[kind]) // 3, 10):
        reason(KINDS[kind][:length])


def test_a_large_jpeg_cut_near_its_end_is_rejected_although_it_is_kept_unread() -> None:
    data = encode(waves((1024, 768)), "JPEG", quality=95)
    assert presize_image(data, 768, 92).made == KEPT
    for missing in (1, 2, 3, 10, 100, 1000):
        assert "truncated" in reason(data[:-missing], 768)


UPRIGHT = [
    {},
    {"progressive": True},
    {"restart_marker_blocks": 3},
    {"subsampling": 0},
    {"quality": 20},
    {"optimize": True},
]


@pytest.mark.parametrize("options", UPRIGHT)
def test_a_jpeg_is_kept_if_and_only_if_it_can_be_decoded(options: dict[str, Any]) -> None:
    data, rng = encode(waves(), "JPEG", **options), random.Random(0)  # noqa: S311
    outcomes = set()
    for _ in range(700):
        damaged = mutated(data, rng)
        try:
            image = Image.open(io.BytesIO(damaged), formats=["JPEG"])
            if image.size != WIDE:
                continue
            image.load()
            decodable = True
        except (OSError, Image.DecompressionBombError):
            decodable = False
        assert isinstance(outcome(damaged, 48), Presized) == decodable
        outcomes.add(decodable)
    assert outcomes == {True, False}


def test_bytes_behind_the_end_of_a_jpeg_are_no_damage() -> None:
    data = KINDS["jpeg"] + b"a camera's own notes \xff\xd8\xff"
    assert presize_image(data, 48, 92).data == data


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, lost or new, as often as not in the header."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 10])):
        at = rng.randrange(rng.choice([len(damaged), min(len(damaged), 200)]))
        length = rng.randrange(1, 5)
        damaged[at : at + rng.choice([0, length])] = rng.randbytes(rng.choice([0, length]))
    return bytes(damaged)


def outcome(data: bytes, size: int) -> Presized | str:
    try:
        return presize_image(data, size, 90)
    except Undecodable as why:
        return str(why)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_gives_an_image_or_a_reason_and_the_same_one_each_time(kind: str) -> None:
    rng = random.Random(kind)  # noqa: S311
    made = {Presized: 0, str: 0}
    for number in range(300):
        data, size = mutated(KINDS[kind], rng), 24 if number % 2 else 48
        found = outcome(data, size)
        if isinstance(found, Presized):
            with Image.open(io.BytesIO(found.data)) as image:
                assert (image.width, image.height, image.mode) == (found.width, found.height, "RGB")
        else:
            assert found
            assert "0x" not in found
        assert outcome(data, size) == found
        made[type(found)] += 1
    assert all(made.values()), "the damage is too little or too much to test anything"


def test_the_decoders_are_those_the_cache_counts_on() -> None:
    assert features.version("libjpeg_turbo")
