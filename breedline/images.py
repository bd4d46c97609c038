"""Presize one image: the file as an upright 8-bit RGB JPEG whose shorter side is at most `size` pixels, never enlarged.

What becomes of each kind of file:

| file | result |
|---|---|
| JPEG, RGB, upright, small enough | checked for whatever would stop a decoder, then kept byte for byte |
| any other image | decoded, converted to RGB, reduced to `size` if larger, turned upright, encoded as JPEG |
| CMYK, YCCK, LAB, grey, 1 bit | converted to RGB as Pillow does, without colour profiles |
| 16 bits a channel | the upper 8 bits |
| alpha or a transparent palette | composited on white, so that hidden colours stay hidden |
| animation, several pages | the first frame |
| EXIF orientation | applied, so that the pixels are upright, and dropped |
| unreadable metadata | ignored: the pixels are intact |
| truncated, damaged, 32 bits a channel, under 1 pixel wide | rejected, with the reason |
| over MAX_PIXELS, or too large to decode within MAX_MEMORY | rejected, with the reason |

Large JPEGs are first decoded at the smallest scale that is still twice the target (libjpeg's `draft`), then reduced
by Lanczos: a quarter of the time of decoding them whole, at 44 dB or better.

Memory, beside the file's own bytes: an image takes at most MAX_MEMORY, and of those that take over LARGE_MEMORY a
process decodes one at a time. Decoders need 4 bytes a pixel, TIFF's up to 12, WebP's 16, and JPEG's 2 more for each
colour where the file is progressive. What comes after them works in strips, so that no second copy of a large image is made.
"""

import io
import re
import threading
from contextlib import nullcontext
from typing import NamedTuple

import PIL
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError, features

from breedline.formats import FORMATS

MAX_PIXELS = 89_478_485
"""A larger image is rejected as a decompression bomb: Pillow's own limit."""
MAX_MEMORY, LARGE_MEMORY = 500_000_000, 100_000_000
"""Bytes; see the module's last paragraph."""
BYTES_PER_PIXEL = {"TIFF": 12, "WEBP": 16}
"""What the decoder takes at its peak, by format; 4 for the others. Pillow itself keeps RGB in 4."""
STRIP_PIXELS = 2**20
"""A strip has about so many pixels, and at least as many rows as are reduced to one."""

_large = threading.Lock()

DECODER = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
"""Part of the cache key, since another decoder may give other bytes."""
VERSION = 2
"""Part of the cache key: raise it when a change of this module changes any result."""

KEPT, RESIZED, ENCODED = "kept", "resized", "encoded"

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transposition that makes the image upright."""

NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""The marker after a scan of a JPEG. Within a scan 0xff is followed by 0x00, or belongs to a restart marker or padding."""
START_OF_SCAN, END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"

DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError)
"""What Pillow's plugins raise on damaged files."""


class Undecodable(Exception):
    """The image is rejected; the message is the reason, as it is listed in rejected.csv."""


class Presized(NamedTuple):
    """A JPEG, its size in pixels, and how it was made: `kept` as it was, `resized` and encoded, or only `encoded`."""

    data: bytes
    height: int
    width: int
    made: str


def presize_image(data: bytes, size: int, quality: int) -> Presized:
    """Presize one image file as the table above says.

    Args:
        data: the file's bytes.
        size: pixels of the shorter side, at most.
        quality: JPEG quality of what is encoded.

    Raises:
        Undecodable: the file is damaged or not supported.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        return _presize(image, data, size, quality)
    except UnidentifiedImageError:
        raise Undecodable(f"not a whole {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
    except Image.DecompressionBombError as error:
        raise Undecodable(f"over {MAX_PIXELS} pixels") from error
    except DAMAGE as error:
        raise Undecodable(str(error) or type(error).__name__) from error


def shorter_side(head: bytes) -> int | None:
    """Pixels of the shorter side that the beginning of an image file declares, or None where it declares none."""
    try:
        with Image.open(io.BytesIO(head), formats=FORMATS) as image:
            return min(image.size)
    except (*DAMAGE, Image.DecompressionBombError):
        return None


def _presize(image: ImageFile.ImageFile, data: bytes, size: int, quality: int) -> Presized:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Undecodable(f"over {MAX_PIXELS} pixels")
    small = min(width, height) <= size
    keep = image.format == "JPEG" and image.mode == "RGB" and small and _orientation(image) not in UPRIGHT
    scale = min(1, size / min(width, height))
    target = (round(width * scale), round(height * scale))
    buffered = _coefficients(image, data)
    # an eighth of the pixels, in grey, is the least work
    image.draft("L", (1, 1)) if keep else image.draft(None, (2 * target[0], 2 * target[1]))
    memory = buffered + _memory(image, target)
    if memory > MAX_MEMORY:
        raise Undecodable(f"decoding it takes over {MAX_MEMORY / 1e6:.0f} MB of memory")
    with _large if memory > LARGE_MEMORY else nullcontext():
        if keep:
            _check(image, data)
            return Presized(data, height, width, KEPT)
        image.load()
        orientation = _orientation(image)  # after decoding, as Pillow turns a TIFF while it loads it
        picture = _rgb(image) if small else _reduced(image, target)
        if orientation in UPRIGHT:
            picture = picture.transpose(UPRIGHT[orientation])
        buffer = io.BytesIO()
        # a small image has no detail to spare, so its chroma keeps the full resolution (4:4:4)
        picture.save(buffer, "JPEG", quality=quality, subsampling=0 if small else 2, comment=b"")
        return Presized(buffer.getvalue(), picture.height, picture.width, ENCODED if small else RESIZED)


def _coefficients(image: ImageFile.ImageFile, data: bytes) -> int:
    """Bytes that libjpeg buffers as DCT coefficients: 2 a value, if the JPEG is progressive or its colours are in several scans."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or not image.fp:
        return 0
    components = data[data.rfind(START_OF_SCAN, 0, image.fp.tell()) + 4]
    one_scan = components == image.layers and "progressive" not in image.info
    return 0 if one_scan else 2 * image.layers * image.width * image.height


def _memory(image: ImageFile.ImageFile, target: tuple[int, int]) -> int:
    """Upper bound, in bytes, of the memory for decoding `image` and reducing it to `target`, (width, height) in pixels."""
    across, down = _factors(image, target)
    pixels = image.width * image.height
    decoding = BYTES_PER_PIXEL.get(str(image.format), 4) * max(pixels, _pixels_of_tile(image))
    strip = 16 * max(STRIP_PIXELS, image.width * down)  # and its conversions
    picture = 9 * pixels // (across * down)  # before and after it is resized or turned, or with its transparency
    return decoding + strip + picture


def _pixels_of_tile(image: ImageFile.ImageFile) -> int:
    """Pixels of one tile of a tiled TIFF, else 0: a tile is decoded whole, and may be declared larger than the image."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    width, height = (image.tag_v2.get(tag, 0) for tag in (TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH))
    return int(width) * int(height)


def _factors(image: Image.Image, target: tuple[int, int]) -> tuple[int, int]:
    """Whole factors that reduce width and height to at least twice `target`, as `resize(reducing_gap=2)` chooses them."""
    return image.width // (2 * target[0]) or 1, image.height // (2 * target[1]) or 1


def _reduced(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """The same bytes as `_rgb(image).resize(target, LANCZOS, reducing_gap=2)`, but converted and reduced in strips."""
    across, down = _factors(image, target)
    picture = Image.new("RGB", (-(-image.width // across), -(-image.height // down)))
    rows = down * max(1, STRIP_PIXELS // (image.width * down))
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        picture.paste(_rgb(strip).reduce((across, down)), (0, top // down))
    box = (0, 0, image.width / across, image.height / down)
    return picture.resize(target, Image.Resampling.LANCZOS, box)


def _check(image: ImageFile.ImageFile, data: bytes) -> None:
    """Raise what decoding the JPEG `data`, opened as `image` in draft mode, would raise, in a fifth of the time.

    Wrong bits within a scan give wrong pixels, but never stop the decoder. Where the end-of-image marker follows the
    first scan (the file is neither progressive nor cut short), it is therefore enough to decode the beginning of the scan.
    """
    scan = image.fp.tell() if image.fp else 0
    marker = NEXT_MARKER.search(data, scan)
    if marker and marker.group() == END_OF_IMAGE:
        image = Image.open(io.BytesIO(data[: scan + 1024] + END_OF_IMAGE), formats=("JPEG",))
        image.draft("L", (1, 1))
    image.load()


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGE:
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, whatever the mode; see the module's table."""
    if image.mode in ("F", "I"):
        raise Undecodable("32 bits a channel, in which no value is known to be white")
    if image.mode.startswith("I;16"):  # `convert` alone would clip every value over 255 to white
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if image.has_transparency_data:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        picture = Image.new("RGB", layer.size, "white")
        picture.paste(layer, mask=layer.getchannel("A"))
        return picture
    return image if image.mode == "RGB" else image.convert("RGB")
