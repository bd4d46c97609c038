"""What decoding an image takes of the memory, measured in processes of their own: never more than the bound."""

import contextlib
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from breedline import images
from breedline.images import MAX_MEMORY, Presized, presize_image

ROOT = Path(__file__).parents[2]
SIDE = 2500
MB = 10**6
CHILD = """
import json, os, sys, threading, warnings
from breedline import images

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

def presize(data):
    try:
        outcomes.append(images.presize_image(data, 64, 90).made)
    except images.Undecodable as reason:
        outcomes.append(str(reason))

warnings.simplefilter("ignore")
images.Image.init()
threads, bound, path = json.loads(sys.argv[1])
images.MAX_MEMORY = bound or images.MAX_MEMORY
with open(path, "rb") as file:
    data = file.read()
outcomes, workers = [], [threading.Thread(target=lambda: presize(data)) for _ in range(threads)]
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is counted from here
before = memory("VmRSS")
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(json.dumps([memory("VmHWM") - before, outcomes]))
"""


class Measured(NamedTuple):
    """Bytes at the peak, beside those of the file; and what became of the image, once for each thread."""

    peak: int
    outcomes: list[str]


@pytest.fixture
def measure(tmp_path: Path) -> Callable[..., Measured]:
    """A function that presizes an image file in a process of its own, in `threads` at once."""

    def run(data: bytes, threads: int = 1, bound: int | None = None) -> Measured:
        (tmp_path / "image").write_bytes(data)
        arguments = json.dumps([threads, bound, str(tmp_path / "image")])
        return Measured(*json.loads(subprocess.check_output([sys.executable, "-c", CHILD, arguments], cwd=ROOT)))

    return run


def blank_png(side: int, channels: int = 4) -> bytes:
    """A PNG of zeros, RGBA or RGB, written a row at a time."""
    rows = zlib.compressobj(1)
    packed = b"".join([rows.compress(bytes(1 + channels * side)) for _ in range(side)]) + rows.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 6 if channels == 4 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


def encode(mode: str, kind: str, **options: Any) -> bytes:
    grey = np.broadcast_to(np.linspace(0, 255, SIDE).astype("uint8"), (SIDE, SIDE))
    image = Image.fromarray(grey.astype("uint16") * 257 if mode == "I;16" else np.ascontiguousarray(grey))
    buffer = io.BytesIO()
    (image if mode == "I;16" else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


WHOLE_STRIP = {"compression": "tiff_lzw", "tiffinfo": {278: SIDE}}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpeg": ("RGB", "JPEG", {}),
    "progressive jpeg": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "progressive cmyk jpeg": ("CMYK", "JPEG", {"progressive": True, "subsampling": 0}),
    "png": ("RGB", "PNG", {}),
    "rgba png": ("RGBA", "PNG", {}),
    "la png": ("LA", "PNG", {}),
    "16 bit png": ("I;16", "PNG", {}),
    "transparent palette png": ("P", "PNG", {"transparency": 0}),
    "gif": ("P", "GIF", {}),
    "bmp": ("RGB", "BMP", {}),
    "webp": ("RGB", "WEBP", {"method": 0}),
    "rgba webp": ("RGBA", "WEBP", {"method": 0}),
    "lossless webp": ("RGB", "WEBP", {"method": 0, "lossless": True}),
    "tiff": ("RGBA", "TIFF", WHOLE_STRIP),
    "16 bit tiff": ("I;16", "TIFF", WHOLE_STRIP),
    "turned tiff": ("RGB", "TIFF", {"tiffinfo": {274: 6}}),
}


def test_an_image_of_88_megapixels_stays_within_the_bound(measure: Callable[..., Measured]) -> None:
    assert measure(blank_png(9400)) == Measured(pytest.approx(MAX_MEMORY * 0.8, rel=0.25), ["resized"])


def jpeg_of_scans() -> bytes:
    """A JPEG that is not progressive, but has each of its colours in a scan of its own: three times the same."""
    grey = encode("L", "JPEG")
    size, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    colours = b"".join(bytes([colour, 0x11, 0]) for colour in (1, 2, 3))
    header = grey[:size] + b"\xff\xc0\0\x11" + grey[size + 4 : size + 9] + b"\3" + colours + grey[size + 13 : scan]
    scans = (b"\xff\xda\0\x08\1" + bytes([colour]) + grey[scan + 6 : -2] for colour in (1, 2, 3))
    return header + b"".join(scans) + b"\xff\xd9"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "jpeg of several scans"])
def test_an_image_is_rejected_if_it_would_take_more_than_the_bound(kind: str, measure: Callable[..., Measured]) -> None:
    mode, form, options = KINDS.get(kind, ("", "", {}))
    data = encode(mode, form, **options) if mode else jpeg_of_scans()
    free = measure(data)
    assert free.outcomes == ["resized"]
    bound = free.peak - MB
    assert measure(data, bound=bound).outcomes == [f"decoding it takes over {bound / MB:.0f} MB of memory"]


def test_large_images_are_decoded_one_at_a_time(measure: Callable[..., Measured]) -> None:
    data = blank_png(5500, channels=3)
    peak, outcomes = measure(data, threads=3)
    assert outcomes == ["resized"] * 3
    assert peak < 2 * 5500**2 * 4


def test_smaller_images_are_decoded_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    monkeypatch.setattr(images, "_large", contextlib.closing(SimpleNamespace(close=lambda: held.append(True))))
    presize_image(blank_png(2000), 64, 90)
    assert held == []
    presize_image(blank_png(5500), 64, 90)
    assert held == [True]


def test_a_tiff_whose_tiles_are_larger_than_itself_is_rejected() -> None:
    pixels = zlib.compress(bytes(16 * 16))
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 16, 323: 16, 324: 0, 325: len(pixels)}

    def tiff(**tile: int) -> bytes:
        start = 8 + 2 + 12 * len(tags) + 4
        entries = tags | {322: tile["side"], 323: tile["side"], 324: start}
        table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
        return b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4) + pixels

    assert presize_image(tiff(side=16), 8, 90).made == "resized"
    with pytest.raises(images.Undecodable, match="decoding it takes over 500 MB"):
        presize_image(tiff(side=30_000), 8, 90)


@pytest.mark.parametrize("size", [(331, 250), (90, 1000), (1000, 33), (640, 480)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK"])
def test_strips_give_the_bytes_of_the_whole(mode: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4)).astype("uint8")
    image = Image.fromarray(noise)
    image = image if mode == "RGBA" else image.convert("RGB" if mode in ("CMYK", "P") else mode).convert(mode)
    buffer, expected = io.BytesIO(), io.BytesIO()
    image.save(buffer, "TIFF")
    target = (round(size[0] * 32 / min(size)), round(size[1] * 32 / min(size)))
    monkeypatch.setattr(images, "STRIP_PIXELS", 5000)
    found = presize_image(buffer.getvalue(), 32, 90)
    white = Image.new("RGB", size, "white")
    white.paste(image.convert("RGBA"), mask=image.convert("RGBA").getchannel("A") if "A" in mode else None)
    whole = white if "A" in mode else image.convert("RGB")
    whole.resize(target, Image.Resampling.LANCZOS, reducing_gap=2).save(expected, "JPEG", quality=90, subsampling=2)
    assert found == Presized(expected.getvalue(), target[1], target[0], "resized")
