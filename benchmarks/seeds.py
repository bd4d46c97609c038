"""How much the test accuracy depends on the seed: the train and evaluate stages over several, on one split of the images.

    python -m benchmarks.seeds [--seeds N]

The data is what `dvc repro presize` has made by params.yaml as it stands: the digits. The spread is compared with the
standard error of an accuracy measured on that many images, sqrt(p (1 - p) / n): seeds that scatter more than twice as
much are a training that is not stable. Exits with 1 if they do.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from breedline.device import machine, pick_device, pick_precision
from breedline.params import Params, load_params
from stages.evaluate import evaluate
from stages.train import train

DATA = Path("data")
GOAL = 2.0


def main(seeds: int) -> bool:
    """Print the accuracy of each seed and their range; whether the goal was met."""
    params = load_params(Path("params.yaml"))
    device = pick_device()
    print(", ".join(f"{k}: {v}" for k, v in machine(device, pick_precision(params.train.precision, device)).items()))
    table = Table("train.seed", "test accuracy", "valid accuracy")
    found = []
    for seed in range(params.train.seed, params.train.seed + seeds):
        numbers = _numbers(params, seed)
        found.append(numbers["test"]["accuracy"])
        table.add_row(str(seed), *(f"{numbers[split]['accuracy']:.4f}" for split in ("test", "valid")))
    Console().print(table)
    mean, spread = statistics.mean(found), statistics.stdev(found)
    images = numbers["test"]["images"]
    expected = (mean * (1 - mean) / images) ** 0.5
    print(f"test accuracy over {seeds} seeds: {min(found):.4f} to {max(found):.4f}, mean {mean:.4f}")
    print(f"standard deviation over seeds    {spread:.4f}")
    print(f"standard error of {images} images  {expected:.4f}")
    ratio = spread / expected if spread else 0.0
    met = ratio <= GOAL
    print(f"ratio                            {ratio:.2f}   (goal: at most {GOAL:g}){'' if met else ' MISSED'}")
    return met


def _numbers(params: Params, seed: int) -> dict[str, dict[str, float]]:
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["BREEDLINE_CACHE"] = str(folder / "cache")  # so that nothing is resumed
        trained, metrics = folder / "models", folder / "evaluate.json"
        train(
            params.train.model_copy(update={"seed": seed}),
            DATA / "presized",
            DATA / "labels.csv",
            DATA / "weights",
            params.presize.shorter_side,
            trained=trained,
            metrics=folder / "train.json",
            report=folder / "train",
        )
        evaluate(
            params.evaluate,
            trained,
            DATA / "presized",
            DATA / "labels.csv",
            metrics=metrics,
            report=folder / "evaluate",
        )
        numbers: dict[str, dict[str, float]] = json.loads(metrics.read_text("utf-8"))
        return numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=main.__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="how many, at least 2")
    arguments = parser.parse_args()
    sys.exit(not main(max(2, arguments.seeds)))
