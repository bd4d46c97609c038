"""Which files count as images."""

from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
"""Formats that Pillow decodes and that cannot refer to other files."""


def sniff(head: bytes) -> str:
    """The image format that the first 32 bytes declare, or "". File extensions are often wrong, magic bytes rarely."""
    Image.init()
    return next((name for name in FORMATS if (accept := Image.OPEN[name][1]) and accept(head)), "")
