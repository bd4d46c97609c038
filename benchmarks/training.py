"""How quick an epoch is: against fast.ai's book, and against the model alone, which is the most there is to have.

    python -m benchmarks.training [--source ARCHIVE] [--images N] [--arch NAME …] [--epochs FROZEN THEN] [--depths] [--switches]

On the same images, with the same body of timm, batch size and schedule, each in a process of its own: (a) the book's chapter 5
as a user would write it; (b) the train stage, as `dvc repro` runs it; (c) the same model with a ready batch on the device.
Images a second are those of the training split over a whole epoch, validation included; the best epoch of the second phase
counts. The images are the photos of ARCHIVE, or ones made of noise, over and over. With a GPU and its goals the default is
the full set; on a CPU it is a few hundred.

Then phase 1 with pretrained weights, in the train stage: the head fitted to features, against the three frozen epochs that
this stands for. Exits with 1 if a goal is missed.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.goals import goal
from benchmarks.photos import IMAGES, archive_of, photos
from benchmarks.workspace import ROOT, environment, keep_bytecode, stage, write_params
from breedline.params import Params, load_params
from breedline.shards import ShardSet
from breedline.tables import read_csv, write_csv

CLASSES = 37
BATCH_SIZE = 64
PRETRAINED = "tf_efficientnet_lite0"
"""Its weights need no network."""
FROZEN_EPOCHS = 3
"""What phase 1 takes in the book, and what fitting the head is compared with."""
ON_GPU = torch.cuda.is_available()
TIMES_THE_BOOK = 5 if ON_GPU else 1.5
PART_OF_THE_CEILING = 0.9
SECONDS_OF_THE_STAGE = {"resnet50": 40}
"""The goals; the two last are for one H200 and the full set, the last for 3 + 6 epochs."""
SWITCHES: list[dict[str, Any]] = [
    {"channels_last": False},
    {"precision": "fp32"},
    {"keep_images": "disk"},
    {"compile": "default"},
]
"""What to turn round, one at a time."""
GPU_SWITCHES: list[dict[str, Any]] = [
    {"compile": "reduce-overhead"},
    {"compile": "none"},
    {"precision": "fp16"},
    {"deterministic": True},
    {"keep_images": "ram"},
]
"""And on a GPU alone, as a CPU would say that it does otherwise, or nothing."""
MARKS = {
    "torch": " when decoded: ",
    "the fitted head": "the head alone, fitted",
    "images, fastai and the model": " to validate, on ",
    "pictures and live log": " epochs of ",
}
"""What the train stage does before it trains, and what it says when it has done that; the head only if it is to be fitted."""
DEPTHS = ["resnet18", "resnet34", "resnet50", "resnet101", "convnext_tiny"]


def main(arguments: argparse.Namespace) -> bool:
    """Print the tables; whether every goal was met."""
    params = load_params(ROOT / "presets/pets.yaml")
    met = True
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        keep_bytecode(folder / "bytecode")
        _prepare(folder, photos(arguments.source, params.download), arguments.images, params)
        print(
            f"{arguments.images} images, {_device()}, {'+'.join(map(str, arguments.epochs))} epochs, best of the second phase"
        )
        for arch in arguments.arch:
            settings = _settings(params, arch, arguments.epochs)
            rows = {arm: _run(arm, folder, settings) for arm in ("book", "stage", "ceiling")}
            met &= _show(arch, rows, arguments)
        _show_phase_1(folder, params)
        if arguments.depths:
            _show_depths(folder, params)
        if arguments.switches:
            _show_switches(folder, _settings(params, arguments.arch[-1], arguments.epochs))
    return met


def _prepare(folder: Path, pictures: list[bytes], images: int, params: Params) -> None:
    """The same images as files (for the book) and as a presized shard set, a fifth of them to validate."""
    archive = archive_of(folder / "all.tar", pictures, range(images))
    (folder / "files").mkdir()
    subprocess.run(["tar", "xf", archive, "-C", folder / "files"], check=True)
    sections = params.model_dump()
    sections["download"] |= {"sources": [{"url": str(archive)}]}
    write_params(folder, sections)
    _process(stage("download", "--raw=raw"), folder)
    _process(stage("weights", f"--arch={PRETRAINED}", "--weights=pretrained"), folder)
    sections["weights"] |= {"source": "none"}
    write_params(folder, sections)
    _process(stage("weights", "--arch=resnet18", "--weights=weights"), folder)
    table = ShardSet(folder / "raw").index[["name", "sha256"]]
    numbers = table["name"].str.extract(r"(\d+)")[0].astype(int)
    labels = "class" + (numbers % CLASSES).map("{:02d}".format)
    splits = numbers.map(lambda number: "valid" if number % 5 == 0 else "train")
    write_csv(table.assign(label=labels, split=splits), folder / "labels.csv")
    _process(stage("presize", "--raw=raw", "--labels=labels.csv", "--presized=presized"), folder)


def _settings(params: Params, arch: str, epochs: list[int]) -> dict[str, Any]:
    changes = {"arch": arch, "batch_size": BATCH_SIZE, "freeze_epochs": epochs[0], "epochs": epochs[1]}
    return params.train.model_dump() | changes


def _run(arm: str, folder: Path, settings: dict[str, Any], weights: str = "weights") -> dict[str, Any]:
    """Of one arm: images a second, seconds of each epoch, gigabytes at the most, seconds in all and until each of MARKS."""
    write_params(folder, load_params(folder / "params.yaml").model_dump() | {"train": settings})
    if arm == "stage":
        inputs = ["--presized=presized", "--labels=labels.csv", f"--weights={weights}", "--item_size=460"]
        command = stage("train", *inputs, "--trained=models", "--metrics=train.json", "--report=report")
    else:
        command = [sys.executable, "-m", __spec__.name, "--arm", arm]
    began = time.perf_counter()
    said, memory, marks = _process(command, folder)
    seconds = time.perf_counter() - began
    epochs = [float(found) for found in re.findall(r"epoch \d+/\d+:.* ([\d.]+) s\b", said)]
    images = len(list((folder / "files").iterdir()))
    if peak := re.search(r"at most ([\d.]+) GB of the GPU", said):
        memory = float(peak[1])
    training = images - -(-images // 5)
    unfrozen = epochs if settings["freeze_epochs"] == "fit" else epochs[settings["freeze_epochs"] :]
    return {"speed": training / min(unfrozen), "epochs": epochs, "memory": memory, "seconds": seconds, "marks": marks}


def _show(arch: str, rows: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> bool:
    table = Table(title=arch)
    for column in ("", "images/s", "GB", "seconds in all", "of it before training"):
        table.add_column(column, justify="right" if column else "left")
    for arm, row in rows.items():
        figures = (row["speed"], row["memory"], row["seconds"], row["marks"]["pictures and live log"])
        table.add_row(arm, *(f"{figure:.1f}" for figure in figures))
    Console().print(table)
    marks = rows["stage"]["marks"]
    parts = [end - begin for begin, end in pairwise([0, *marks.values()])]
    said = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in zip(marks, parts, strict=True))
    print(f"the stage before training: {said}")
    met = goal(f"{arch}: times the book", rows["stage"]["speed"] / rows["book"]["speed"], least=TIMES_THE_BOOK)
    full = ON_GPU and arguments.images == IMAGES
    part = rows["stage"]["speed"] / rows["ceiling"]["speed"]
    met &= goal(f"{arch}: of the ceiling", part, least=PART_OF_THE_CEILING if ON_GPU else float("-inf"))
    if full and arguments.epochs == [3, 6] and arch in SECONDS_OF_THE_STAGE:
        met &= goal(f"{arch}: seconds of the stage", rows["stage"]["seconds"], most=SECONDS_OF_THE_STAGE[arch])
    return met


def _show_phase_1(folder: Path, params: Params) -> None:
    """One epoch of everything follows in both, so that the whole processes compare, too."""
    table = Table(
        "phase 1", "seconds", "seconds in all", title=f"{PRETRAINED}, pretrained: before its first epoch of everything"
    )
    settings = _settings(params, PRETRAINED, [FROZEN_EPOCHS, 1])
    frozen = _run("stage", folder, settings, "pretrained")
    fitted = _run("stage", folder, settings | {"freeze_epochs": "fit"}, "pretrained")
    marks = fitted["marks"]
    phase = {
        f"{FROZEN_EPOCHS} frozen epochs": (sum(frozen["epochs"][:FROZEN_EPOCHS]), frozen["seconds"]),
        "images decoded, fastai imported, features, fit": (
            marks["the fitted head"] - marks["torch"],
            fitted["seconds"],
        ),
    }
    for what, seconds in phase.items():
        table.add_row(what, *(f"{each:.1f}" for each in seconds))
    Console().print(table)
    of_phase, of_all = (fit / epochs for epochs, fit in zip(*phase.values(), strict=True))
    goal("phase 1: the fit, of the frozen epochs' seconds", of_phase)
    goal("the whole stage with one more epoch, of the seconds", of_all)


def _show_switches(folder: Path, settings: dict[str, Any]) -> None:
    table = Table("switch", "images/s", "GB", "seconds in all", title=f"{settings['arch']}, one setting turned round")
    for change in [{}, *SWITCHES, *(GPU_SWITCHES if ON_GPU else [])]:
        row = _run("stage", folder, settings | change)
        name = ", ".join(f"{key}: {value}" for key, value in change.items()) or "as it is"
        table.add_row(name, *(f"{row[figure]:.1f}" for figure in ("speed", "memory", "seconds")))
    Console().print(table)


def _show_depths(folder: Path, params: Params) -> None:
    from breedline.zoo import create_model

    table = Table("train.arch", "parameters", "images/s", "GB", title="the model alone, batches of 16")
    for arch in DEPTHS:
        row = _run("ceiling", folder, _settings(params, arch, [1, 1]) | {"batch_size": 16})
        millions = sum(weights.numel() for weights in create_model(arch, CLASSES).parameters()) / 1e6
        table.add_row(arch, f"{millions:.1f} M", f"{row['speed']:.1f}", f"{row['memory']:.1f}")
    Console().print(table)


def _process(command: list[str], folder: Path) -> tuple[str, float, dict[str, float]]:
    """What it says, the most memory of it and its children in GB, and the seconds until each of MARKS."""
    began, peak = time.perf_counter(), 0.0
    marks: dict[str, float] = {}
    log = folder / "log"
    with (
        log.open("w") as output,
        psutil.Popen(command, cwd=folder, env=environment(folder), stdout=output, stderr=output) as process,
    ):
        while process.poll() is None:
            time.sleep(0.1)
            try:
                peak = max(peak, sum(each.memory_info().rss for each in [process, *process.children(recursive=True)]))
            except psutil.NoSuchProcess:  # it ends when it likes
                continue
            so_far = log.read_text()
            for what, mark in MARKS.items():
                if mark in so_far:
                    marks.setdefault(what, time.perf_counter() - began)
    said = log.read_text()
    if process.returncode:
        sys.exit(said)
    return said, peak / 1e9, marks


def _book(params: Params) -> None:
    """Chapter 5 of the book, with the photos as files and without weights, as the stage has none either."""
    from benchmarks.book import book_learner

    table = read_csv(Path("labels.csv"), ["name", "label", "split"])
    learn = book_learner(params, table, Path("files"), Path("weights"), BATCH_SIZE)
    _fit(learn.to_fp16() if ON_GPU else learn, params)


def _ceiling(params: Params) -> None:
    """One batch, again and again."""
    from fastai.data.core import DataLoaders

    from breedline.device import choose_kernels, pick_device, pick_precision
    from breedline.learner import Graphs, create_learner
    from breedline.losses import loss_function
    from breedline.zoo import create_model

    device = pick_device()
    choose_kernels(device, deterministic=False)
    images = len(list(Path("files").iterdir()))
    size, batch = params.train.image_size, int(params.train.batch_size)
    valid = -(-images // 5)
    dls = DataLoaders(
        *(
            Ready(count, torch.rand(batch, 3, size, size).to(device).to(memory_format=torch.channels_last), device)
            for count in ((images - valid) // batch, -(-valid // batch))
        ),
        device=device,
    )
    model, loss = create_model(params.train.arch, CLASSES), loss_function("cross_entropy")
    precision = pick_precision(params.train.precision, device)
    learn = create_learner(dls, model, loss, precision=precision, channels_last=True)
    if device.type == "cuda" and params.train.compile == "auto":
        learn.add_cb(Graphs(precision))
    _fit(learn, params)


class Ready:
    """A loader that has nothing to load."""

    def __init__(self, batches: int, images: torch.Tensor, device: torch.device) -> None:
        self.batches, self.device, self.n_inp = batches, device, 1
        self.batch = images, torch.zeros(len(images), dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterable[Any]:
        return iter([self.batch] * self.batches)


def _fit(learn: Any, params: Params) -> None:
    """Say how long each epoch takes, in the words of the stage."""
    import fastai.callback.schedule  # noqa: F401 - gives Learner its fine_tune
    from fastai.callback.core import Callback

    class Clock(Callback):
        def before_epoch(self) -> None:
            self.began = time.perf_counter()

        def after_epoch(self) -> None:
            print(f"epoch {self.epoch}/{self.n_epoch}: {time.perf_counter() - self.began:.2f} s", flush=True)

    with learn.no_bar(), learn.no_logging():
        print("its epochs of everything", flush=True)
        learn.add_cb(Clock())
        learn.fine_tune(int(params.train.epochs), 2e-3, freeze_epochs=int(params.train.freeze_epochs))
    if ON_GPU:
        print(f"at most {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU")


def _device() -> str:
    return torch.cuda.get_device_name() if ON_GPU else f"the CPU, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=main.__doc__)
    parser.add_argument("--source", type=Path, metavar="ARCHIVE", help="real photos to use, rather than noise")
    parser.add_argument("--images", type=int, default=IMAGES if ON_GPU else 400)
    parser.add_argument("--arch", nargs="*", default=["resnet34", "resnet50"] if ON_GPU else ["resnet18", "resnet34"])
    parser.add_argument("--epochs", nargs=2, type=int, default=[3, 6] if ON_GPU else [1, 2], metavar=("FROZEN", "THEN"))
    parser.add_argument("--switches", action="store_true", help="also turn round each setting that decides the speed")
    parser.add_argument("--depths", action="store_true", help="also ask what each depth costs")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        {"book": _book, "ceiling": _ceiling}[arguments.arm](load_params(Path("params.yaml")))
        sys.exit()
    sys.exit(not main(arguments))
