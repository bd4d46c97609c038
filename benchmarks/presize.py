"""How quick and how large presizing is: against fastai's `resize_images`, on grown data, and in memory.

    python -m benchmarks.presize [--source ARCHIVE]

The data has the size of the Oxford-IIIT Pets: 7,390 JPEGs, made here of noise, or the photos of ARCHIVE over and over,
each with a comment of its own so that no two are the same bytes. Both make them of size 460: fastai the longer side,
presize the shorter one. Exits with 1 if a goal is missed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.goals import goal
from benchmarks.photos import IMAGES, archive_of, photos
from benchmarks.workspace import cost_of, environment
from breedline.params import Params, Presize, load_params
from breedline.shards import ShardSet
from breedline.tables import write_csv
from stages.presize import presize

ROOT = Path(__file__).parents[1]
MORE = 74
SETTINGS = Presize(shorter_side=460, quality=92)
WORKERS = 2
ROUNDS = 3
TIMES_FASTER, TIMES_FASTER_AGAIN, MEGABYTES = 3, 20, 600
"""The goals."""


def main(source: Path | None) -> bool:
    """Print the table; whether every goal was met."""
    params = load_params(ROOT / "params.yaml")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pictures = photos(source, params.download)
        few = archive_of(folder / "few.tar", pictures, range(IMAGES // 4))
        all_ = archive_of(folder / "all.tar", pictures, range(IMAGES))
        more = archive_of(folder / "more.tar", pictures, range(IMAGES, IMAGES + MORE))
        kind = "made of noise" if source is None else f"from {source.name}"
        size = sum(map(len, pictures)) / len(pictures) / 1e3
        print(f"{IMAGES:,} JPEGs {kind}, {size:.0f} kB on average; size {SETTINGS.shorter_side}, {WORKERS} workers\n")

        quarter = _memory(_workspace(folder / "quarter", params, few))
        shutil.rmtree(folder / "quarter")
        whole = _memory(_workspace(folder / "whole", params, all_))
        met = [
            goal(f"memory of {stage} (of a quarter of the data: {quarter[stage]:.0f} MB)", peak, "MB", most=MEGABYTES)
            for stage, peak in whole.items()
        ]

        grown = _workspace(folder / "grown", params, all_, more)
        _run("download", grown)
        theirs, first, again = _race(all_, folder / "whole", grown, folder)
        goal(f"fastai's resize_images, best of {ROUNDS}", theirs, "s")
        goal(f"presize, best of {ROUNDS}", first, "s")
        goal(f"presize again, with 1 % more images, best of {ROUNDS}", again, "s")
        met += [
            goal("presize is quicker than fastai", theirs / first, "times", least=TIMES_FASTER),
            goal("and again, than the first time", first / again, "times", least=TIMES_FASTER_AGAIN),
        ]
    return all(met)


def _workspace(folder: Path, params: Params, *archives: Path) -> Path:
    """A working folder whose params.yaml downloads `archives`."""
    sources = [{"url": str(archive)} for archive in archives]
    settings = params.model_dump() | {"presize": SETTINGS.model_dump()}
    settings["download"] |= {"sources": sources}
    folder.mkdir()
    (folder / "params.yaml").write_text(json.dumps(settings))  # which is YAML, too
    return folder


def _memory(folder: Path) -> dict[str, float]:
    """The most memory, in MB, that each stage and its processes took together."""
    return {stage: _run(stage, folder) for stage in ("download", "presize")}


def _run(stage: str, folder: Path) -> float:
    options = {
        "download": ["--raw=raw"],
        "presize": ["--raw=raw", "--labels=labels.csv", "--presized=presized", f"--workers={WORKERS}"],
    }
    peak = cost_of([sys.executable, "-m", f"stages.{stage}", *options[stage]], folder, environment(folder)).megabytes
    if stage == "download":
        write_csv(ShardSet(folder / "raw").index[["name", "sha256"]], folder / "labels.csv")
    return peak


def _race(archive: Path, whole: Path, grown: Path, folder: Path) -> tuple[float, ...]:
    """Seconds of fastai, presize, and presize again: the best of some rounds, as other programs are at work, too."""
    (folder / "files").mkdir()
    subprocess.run(["tar", "xf", archive, "-C", folder / "files"], check=True)
    rounds = []
    for _ in range(ROUNDS):
        for earlier in ("fastai", "cache", "presized"):
            shutil.rmtree(folder / earlier, ignore_errors=True)
        theirs = _fastai_seconds(folder / "files", folder / "fastai")
        rounds.append((theirs, _seconds(whole, folder), _seconds(grown, folder)))
    return tuple(map(min, zip(*rounds, strict=True)))


def _fastai_seconds(files: Path, resized: Path) -> float:
    from fastai.vision.utils import resize_images  # after stages, which knows which of its warnings to pass over

    _read_all(files)
    start = time.perf_counter()
    resize_images(files, max_workers=WORKERS, max_size=SETTINGS.shorter_side, dest=resized)
    return time.perf_counter() - start


def _seconds(workspace: Path, folder: Path) -> float:
    os.environ["BREEDLINE_CACHE"] = str(folder / "cache")
    _read_all(workspace / "raw")
    start = time.perf_counter()
    presize(SETTINGS, workspace / "raw", workspace / "labels.csv", presized=folder / "presized", workers=WORKERS)
    return time.perf_counter() - start


def _read_all(folder: Path) -> None:
    """Both begin with their files in the page cache."""
    for file in folder.iterdir():
        file.read_bytes()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.presize", description=main.__doc__)
    parser.add_argument("--source", type=Path, metavar="ARCHIVE", help="real photos to use, rather than noise")
    sys.exit(not main(parser.parse_args().source))
