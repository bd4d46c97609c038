"""How long a stage takes to start: until its first image is decoded, and until the first batch has been through the body.

    python -m benchmarks.startup [--against FOLDER]

The train and the evaluate stage, each as `dvc repro` starts it, with the embedded digits and a pretrained body; a wrapper
looks on from outside, and ends the process when it has seen both. With --against, a checkout of another version runs in
turn, in the same environment, with the settings of its own params.yaml but for those of SAME. Medians of five. Exits with 1
if a goal is missed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from benchmarks.goals import goal
from benchmarks.workspace import ROOT, environment, keep_bytecode, seconds_of, stage, write_params

ROUNDS = 5
GOALS = {"train": 0.65, "evaluate": 0.45}
"""Of the other version's seconds until the first image is decoded."""
SAME = {"arch": "tf_efficientnet_lite0", "image_size": 32, "batch_size": 32, "epochs": 1, "precision": "fp32"}
"""Settings of `train` in all versions."""
OBSERVED = """
import os, runpy, sys, time
from PIL import ImageFile
import torch

load, seen = ImageFile.ImageFile.load, []

def decoded(image):
    result = load(image)
    seen or seen.append(time.monotonic())
    return result

def through(module, inputs, output):
    pooled = isinstance(output, torch.Tensor) and inputs[0].ndim == 4 and output.ndim == 2
    if pooled and len(output) > 1:  # one image may be there to find out about shapes
        print(*seen, time.monotonic(), flush=True)
        os._exit(0)

ImageFile.ImageFile.load = decoded
torch.nn.modules.module.register_module_forward_hook(through)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
"""Runs a stage whose options follow its name; says when an image was decoded, and when the features of a batch are pooled.

Both versions import torch and Pillow before they do anything else with images, so that importing them here costs neither.
"""


def main(against: Path | None) -> bool:
    """Print the medians; whether every goal was met."""
    checkouts = {"this": ROOT, **({"other": against.resolve()} if against else {})}
    found: dict[tuple[str, str], list[list[float]]] = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        keep_bytecode(folder / "bytecode")
        for version, code in checkouts.items():
            _prepare(folder / version, code)
        for _ in range(ROUNDS):
            for name in GOALS:
                for version, code in checkouts.items():
                    found.setdefault((name, version), []).append(_observed(name, folder / version, code))
    medians = {key: [statistics.median(each) for each in zip(*rounds, strict=True)] for key, rounds in found.items()}
    table = Table("stage", "version", "first image (s)", "first batch (s)")
    for (name, version), figures in medians.items():
        table.add_row(name, version, *(f"{seconds:.2f}" for seconds in figures))
    Console().print(table)
    if not against:
        return True
    met = []
    for name, most in GOALS.items():
        image, batch = (ours / other for ours, other in zip(medians[name, "this"], medians[name, "other"], strict=True))
        met.append(goal(f"{name}: of the other's seconds until the first image", image, most=most))
        goal(f"{name}: of the other's seconds until the first batch", batch)
    return all(met)


def _options(name: str, item_size: int, code: Path) -> list[str]:
    model = "trained" if (code / "breedline/trained.py").exists() else "bundle"  # its name in that version
    data = ["--presized=presized", "--labels=labels.csv", f"--{model}=models", f"--metrics={name}.json"]
    more = (
        ["--weights=weights", f"--item_size={item_size}", "--report=trained"] if name == "train" else ["--report=found"]
    )
    return [*data, *more]


def _prepare(folder: Path, code: Path) -> None:
    """The digits as that version presizes them, and its bundle of one epoch; so all of its bytecode is there, too."""
    sections = YAML(typ="safe").load(code / "params.yaml")  # whatever settings that version has
    sections["train"] |= SAME
    sections["weights"] |= {"source": "imagenet"}
    write_params(folder, sections)
    (folder / "corrections.csv").write_text("name,sha256,action,label,reason\n")
    names = ["corrections", "labels", "rejected", "classes"]
    if (code / "stages/duplicates.py").exists():
        (folder / "duplicates.csv").write_text("sha256,leader\n")
        names.append("duplicates")
    tables = [f"--{name}={name}.csv" for name in names]
    item_size = sections["presize"]["shorter_side"]
    for command in (
        stage("download", "--raw=raw"),
        stage("weights", f"--arch={sections['train']['arch']}", "--weights=weights"),
        stage("label", "--raw=raw", *tables, "--metrics=label.json"),
        stage("presize", "--raw=raw", "--labels=labels.csv", "--presized=presized"),
        stage("train", *_options("train", item_size, code)),
        stage("evaluate", *_options("evaluate", item_size, code)),
    ):
        seconds_of(command, folder, code)


def _observed(name: str, folder: Path, code: Path) -> list[float]:
    """Seconds from the start of the process until the first image is decoded, and until the first batch is through."""
    options = _options(name, json.loads((folder / "params.yaml").read_text("utf-8"))["presize"]["shorter_side"], code)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", OBSERVED, f"stages.{name}", *options],
        cwd=folder,
        env=environment(folder, code),
        text=True,
        capture_output=True,
    )
    if done.returncode or not done.stdout:
        sys.exit(done.stderr)
    return [float(moment) - began for moment in done.stdout.split()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=main.__doc__)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="a checkout of another version")
    sys.exit(not main(parser.parse_args().against))
