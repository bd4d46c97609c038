"""Which files count as images."""

from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
"""What counts as an image: formats that Pillow decodes and that cannot point outside themselves."""


def sniff(head: bytes) -> str:
    """The image format that the first 32 bytes declare, or "". Extensions lie; magic bytes rarely do."""
    Image.init()
    return next((name for name in FORMATS if (accept := Image.OPEN[name][1]) and accept(head)), "")
