"""The photos that benchmarks work on: real ones of an archive, or made of noise, over and over."""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from breedline.formats import sniff
from breedline.params import Download, Source
from breedline.sources import members

IMAGES = 7_390
"""Of the Oxford-IIIT Pets."""
SIZES = {
    (500, 375): 80,
    (500, 333): 40,
    (375, 500): 20,
    (300, 225): 16,
    (333, 500): 16,
    (300, 200): 8,
    (400, 300): 6,
    (500, 480): 10,
    (800, 600): 3,
    (1600, 1200): 1,
}
"""(width, height) in pixels: how many of 200, much as in the Pets; 93 % are small enough to keep."""


def photos(source: Path | None, settings: Download) -> list[bytes]:
    """The JPEGs of an archive; where there is none, 200 of soft noise, each of about the bytes of a photo."""
    return list(_made() if source is None else _of(source, settings))


def _made() -> Iterator[bytes]:
    random = np.random.default_rng(0)
    for (width, height), count in SIZES.items():
        for _ in range(count):
            picture = np.full((height, width, 3), 128.0)
            for detail in (4, 16, 64):
                cell = detail * max(width, height) // 500  # a larger photo shows the same things
                noise = random.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype="uint8")
                picture += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) - 128.0
            buffer = io.BytesIO()
            Image.fromarray(picture.clip(0, 255).astype("uint8")).save(buffer, "JPEG", quality=90)
            yield buffer.getvalue()


def _of(archive: Path, settings: Download) -> Iterator[bytes]:
    for member in members(Source(url=str(archive.resolve())), settings):
        content = member.file.read()
        if sniff(content[:32]) == "JPEG":
            yield content


def archive_of(
    path: Path, pictures: list[bytes], numbers: Iterable[int], name: Callable[[int], str] = "{:05d}.jpg".format
) -> Path:
    """Pack one photo for each number, with the number as a comment behind the JPEG's first marker."""
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            photo, comment = pictures[number % len(pictures)], b"\xff\xfe\x00\x0a%08d" % number
            content = photo[:2] + comment + photo[2:]
            info = tarfile.TarInfo(name(number))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
