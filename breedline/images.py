"""One image file made ready for training: upright 8-bit RGB JPEG, its shorter side at most `size`, never enlarged.

What happens to each kind of file:

| file | result |
|---|---|
| JPEG, RGB, upright, small enough | checked as decoding would, then passed through byte for byte |
| any other image | decoded, converted to RGB, reduced if need be, turned upright, encoded as JPEG |
| CMYK, YCCK, LAB, grey, 1 bit | converted to RGB as Pillow does, without colour profiles |
| 16 bits a channel | the upper 8 bits |
| alpha or a transparent palette | laid on white, so that hidden colours stay hidden |
| animation, several pages | the first frame |
| EXIF orientation | applied, so that the pixels are upright, and dropped |
| metadata that cannot be read | ignored: the pixels are whole |
| truncated, damaged, 32 bits a channel, over MAX_PIXELS, under 1 pixel wide | rejected, with the reason |

Large JPEGs are first decoded at the smallest scale that is still twice the target (libjpeg's `draft`), then reduced
by Lanczos: a quarter of the time of decoding them whole, at 44 dB or better.
"""

import io
import re
from typing import NamedTuple

import PIL
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features

from breedline.formats import FORMATS

MAX_PIXELS = 89_478_485
"""A larger image is refused as a decompression bomb: Pillow's own limit, a quarter of a GiB as RGB."""

DECODER = f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
"""Part of the cache key, since another decoder may give other bytes. Raise the version when this module does."""
VERSION = 1

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
"""EXIF orientation: what makes the pixels upright."""

NEXT_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""What follows a scan of a JPEG. Inside of one, 0xff comes before a zero, or is a restart mark or padding."""
END_OF_IMAGE = b"\xff\xd9"

DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError)
"""What Pillow's plugins raise on damaged files, which is nearly anything."""


class Undecodable(Exception):
    """The file cannot be used; the message is the reason."""


class Presized(NamedTuple):
    """A JPEG, its size in pixels, and how it came about: `kept`, `resized` (and encoded) or only `encoded`."""

    data: bytes
    height: int
    width: int
    made: str


def presize_image(data: bytes, size: int, quality: int) -> Presized:
    """Make one image file ready; see the module's table.

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


def _presize(image: ImageFile.ImageFile, data: bytes, size: int, quality: int) -> Presized:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Undecodable(f"over {MAX_PIXELS} pixels")
    small = min(width, height) <= size
    if image.format == "JPEG" and image.mode == "RGB" and small and _orientation(image) not in UPRIGHT:
        _check(image, data)
        return Presized(data, height, width, KEPT)

    scale = min(1, size / min(width, height))
    target = (round(width * scale), round(height * scale))
    image.draft(None, (2 * target[0], 2 * target[1]))
    picture = _rgb(image)
    if not small:
        picture = picture.resize(target, Image.Resampling.LANCZOS, reducing_gap=2)
    orientation = _orientation(image)  # asked once decoded: TIFF has turned itself by then
    if orientation in UPRIGHT:
        picture = picture.transpose(UPRIGHT[orientation])
    buffer = io.BytesIO()
    # what was small has no detail to spare, so its colours keep their full resolution
    picture.save(buffer, "JPEG", quality=quality, subsampling=0 if small else 2, comment=b"")
    return Presized(buffer.getvalue(), picture.height, picture.width, ENCODED if small else RESIZED)


def _check(image: ImageFile.ImageFile, data: bytes) -> None:
    """Raise what decoding the JPEG `data`, just opened as `image`, would raise, in a fifth of the time.

    No bits within a scan stop the decoder, they are only wrong pixels; so where the end of the image follows the
    first scan, as it does unless the file is progressive or cut short, the beginning of the scan stands for all of it.
    """
    scan = image.fp.tell() if image.fp else 0
    marker = NEXT_MARKER.search(data, scan)
    if marker and marker.group() == END_OF_IMAGE:
        image = Image.open(io.BytesIO(data[: scan + 1024] + END_OF_IMAGE), formats=("JPEG",))
    image.draft("L", (1, 1))  # an eighth of the pixels, in grey, is the least work
    image.load()


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGE:
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, whatever the mode; see the module's table."""
    if image.mode in ("F", "I"):
        raise Undecodable("32 bits a channel, of which nothing says where white is")
    if image.mode.startswith("I;16"):  # `convert` would clip all but the darkest to white
        return image.convert("I").point(lambda value: value / 256).convert("L").convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        picture = Image.new("RGB", layer.size, "white")
        picture.paste(layer, mask=layer.getchannel("A"))
        return picture
    return image.convert("RGB")
