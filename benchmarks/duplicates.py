"""What of edited copies the duplicates stage finds, what it takes for copies that are none, and how long it takes.

    python -m benchmarks.duplicates [--source ARCHIVE]

Each photo of ARCHIVE, or each one made of noise, is edited in the ways of EDITS. Of each way all copies come after all photos,
as a later source would: a copy is found if it joins the group of its photo. Photos that join each other are pairs that
somebody should look at. Then random hashes, none of them alike, show what the search takes as the images grow. Exits with 1
if a goal is missed.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from PIL import Image, ImageEnhance, ImageOps

from benchmarks.goals import goal
from benchmarks.photos import photos
from benchmarks.workspace import ROOT
from breedline.duplicates import SIDE, Sketch, leaders, sketches
from breedline.params import load_params
from breedline.shards import COLUMNS, ShardSet, pack, write_index

SEARCHED = (10_000, 100_000)
NONE = float("-inf")
Edit = Callable[[Image.Image], Image.Image]


def _cropped(part: float) -> Edit:
    return lambda photo: ImageOps.fit(photo, photo.size, bleed=part / 2)


def _resized(scale: float) -> Edit:
    return lambda photo: ImageOps.scale(photo, scale)


def _brightened(factor: float) -> Edit:
    return lambda photo: ImageEnhance.Brightness(photo).enhance(factor)


EDITS: dict[str, tuple[Edit, int, float]] = {
    "encoded anew, quality 90": (lambda photo: photo, 90, 0.99),
    "encoded anew, quality 50": (lambda photo: photo, 50, 0.99),
    "reduced to 0.9": (_resized(0.9), 90, 0.99),
    "reduced to 0.5": (_resized(0.5), 90, 0.99),
    "cropped by 2 %": (_cropped(0.02), 90, 0.99),
    "cropped by 5 %": (_cropped(0.05), 90, 0.95),
    "cropped by 10 %": (_cropped(0.1), 90, NONE),
    "10 % brighter": (_brightened(1.1), 90, 0.99),
    "10 % darker": (_brightened(0.9), 90, 0.99),
    "grey": (ImageOps.grayscale, 90, 0.99),
    "turned by 1 degree": (lambda photo: photo.rotate(1, Image.Resampling.BICUBIC), 90, 0.95),
    "mirrored": (ImageOps.mirror, 90, NONE),
}
"""What is done, the JPEG quality, and the goal: the share of the copies that is found, at least."""


def main(source: Path | None) -> bool:
    """Print the figures; whether every goal was met."""
    params = load_params(ROOT / "presets/photos.yaml")
    similarity = params.duplicates.similarity
    assert similarity is not None
    originals = photos(source, params.download)
    found, seconds = _sketched([originals, *(_edited(originals, *EDITS[name][:2]) for name in EDITS)])
    groups = leaders(found[0], similarity)
    print(f"{len(originals)} photos, similarity {similarity}")
    goal("photos in the group of another photo", sum(groups != np.arange(len(groups))))
    met, wrong = [], 0
    for (name, (_, _, least)), copies in zip(EDITS.items(), found[1:], strict=True):
        joined = leaders([*found[0], *copies], similarity)[len(groups) :]
        met.append(goal(f"found: {name}", float(np.mean(joined == groups)), least=least))
        wrong += sum((joined != groups) & (joined < len(groups)))
    goal("copies taken for another photo's", wrong)
    goal("reduce and hash a photo, of the CPU", 1000 * seconds, "ms")
    for images in SEARCHED:
        goal(f"search {images:,} random hashes, of the CPU", _search(images), "s")
    return all(met)


def _edited(originals: list[bytes], edit: Edit, quality: int) -> list[bytes]:
    copies = []
    for original in originals:
        buffer = io.BytesIO()
        edit(Image.open(io.BytesIO(original)).convert("RGB")).save(buffer, "JPEG", quality=quality)
        copies.append(buffer.getvalue())
    return copies


def _sketched(sources: list[list[bytes]]) -> tuple[list[list[Sketch]], float]:
    """The sketches of each source's images, and the seconds of the processor that one image took."""
    with TemporaryDirectory() as temporary:
        os.environ["BREEDLINE_CACHE"] = f"{temporary}/cache"
        raw = Path(temporary) / "raw"
        raw.mkdir()
        files = (
            (f"{number}/{place}.jpg", len(image), io.BytesIO(image))
            for number, images in enumerate(sources)
            for place, image in enumerate(images)
        )
        write_index(pd.DataFrame(pack(files, raw, "00"), columns=COLUMNS), raw)
        index = ShardSet(raw).index
        began = time.process_time()
        found = dict(sketches(raw, index.drop_duplicates("sha256"), lambda pieces: None))
        seconds = (time.process_time() - began) / len(found)
    each = iter(found[sha256] for sha256 in index["sha256"])
    return [[next(each) for _ in images] for images in sources], seconds


def _search(images: int) -> float:
    """Seconds of the processor to compare that many images of which no two are alike: each becomes a leader."""
    random = np.random.default_rng(0)
    made = [Sketch(int(number), random.bytes(SIDE * SIDE)) for number in random.integers(0, 2**64, images, np.uint64)]
    began = time.process_time()
    leaders(made, 0.9)
    return time.process_time() - began


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.duplicates", description=main.__doc__)
    parser.add_argument("--source", type=Path, metavar="ARCHIVE", help="real photos to use, rather than noise")
    sys.exit(not main(parser.parse_args().source))
