"""How fast a published model is used: one photo from a cold start, and many.

    python -m benchmarks.predict [--bundle FOLDER] [--source ARCHIVE] [--images N] [--fastai PRESIZED LABELS PARAMS]

One photo: the whole process of `breedline predict`, its bytecode cached; a median of seven. Many photos, files in a folder:
`breedline predict` beside what decoding and the model alone take on the same cores, one after the other, and with --fastai
beside a loop of Learner.predict on the same bundle, for fewer photos. The start is left out: of `breedline predict`, the
seconds of one photo are. Exits with 1 if a goal is missed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.goals import goal
from benchmarks.photos import photos
from benchmarks.workspace import ROOT, environment, keep_bytecode, seconds_of
from breedline.classifier import Classifier
from breedline.params import load_params
from breedline.preprocessing import view_of_photo

ROUNDS, WITH_FASTAI = 7, 200
COMMAND = [sys.executable, "-c", "from flows.cli import main; main()", "predict"]
FASTAI = """
import sys, time
from breedline.notebook import dataloaders, learner

presized, labels, params, bundle, *photos = sys.argv[1:]
learn = learner(dataloaders(presized, labels, params), bundle=bundle)
with learn.no_bar():
    learn.predict(photos[0])
    began = time.perf_counter()
    for photo in photos:
        learn.predict(photo)
print((time.perf_counter() - began) / len(photos))
"""


def main(bundle: Path, source: Path | None, images: int, fastai: list[Path] | None) -> bool:
    """Print the figures; whether every goal was met."""
    bundle = bundle.resolve()
    kinds = photos(source, load_params(ROOT / "params.yaml").download)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        keep_bytecode(folder / "bytecode")
        many = folder / "photos"
        many.mkdir()
        files = [many / f"{number:05d}.jpg" for number in range(images)]
        for number, file in enumerate(files):
            file.write_bytes(kinds[number % len(kinds)])
        ours = [*COMMAND, "--model", str(bundle), "--json"]
        seconds_of([*ours, str(files[0])], folder)  # compiles what it imports
        cold = statistics.median(seconds_of([*ours, str(files[0])], folder) for _ in range(ROUNDS))
        met = [goal("one photo, the whole process", cold, "s", most=0.8)]
        print(f"{images} photos on {len(os.sched_getaffinity(0))} cores:")
        whole = seconds_of([*ours, str(many)], folder) - cold
        decoding, computing = _alone(bundle, files)
        goal("breedline predict", images / whole, "/s")
        goal("decoding alone", images / decoding, "/s")
        goal("the model alone", images / computing, "/s")
        met.append(goal("of what both alone allow", (decoding + computing) / whole, least=0.9))
        if fastai:
            theirs = _with_fastai([*fastai, bundle, *files[:WITH_FASTAI]], folder)
            goal("Learner.predict in a loop", 1 / theirs, "/s")
            met.append(goal("times as fast as Learner.predict", theirs * images / whole, least=3))
    return all(met)


def _alone(bundle: Path, files: list[Path]) -> tuple[float, float]:
    """Seconds to decode the files on all cores, and to compute for as many views."""
    classifier = Classifier.load(bundle)
    how = classifier.spec.preprocessing
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        decoding = _seconds(lambda: [*pool.map(lambda file: view_of_photo(file.read_bytes(), how).shape, files)])
    views = np.zeros((classifier.batch_size, how.input_size, how.input_size, 3), np.uint8)
    classifier._probabilities(views)
    batches, rest = divmod(len(files), classifier.batch_size)
    computing = _seconds(
        lambda: [classifier._probabilities(part) for part in [*[views] * batches, *[views[:rest]] * (rest > 0)]]
    )
    return decoding, computing


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _with_fastai(arguments: list[Path], folder: Path) -> float:
    """Seconds for each photo."""
    command = [sys.executable, "-c", FASTAI, *(str(argument.resolve()) for argument in arguments)]
    done = subprocess.run(command, cwd=folder, env=environment(folder), text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=main.__doc__)
    parser.add_argument("--bundle", type=Path, default=ROOT / "models", help="a bundle's folder (models)")
    parser.add_argument("--source", type=Path, help="an archive of photos, rather than images made of noise")
    parser.add_argument("--images", type=int, default=2000, help="how many photos (2000)")
    parser.add_argument(
        "--fastai", type=Path, nargs=3, metavar=("PRESIZED", "LABELS", "PARAMS"), help="what the bundle was trained on"
    )
    options = parser.parse_args()
    sys.exit(not main(options.bundle, options.source, options.images, options.fastai))
