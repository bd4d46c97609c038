"""How quick an epoch is: against fast.ai's book, and against the model alone, which is the most there is to have.

    python -m benchmarks.training [--source ARCHIVE] [--images N] [--arch NAME …] [--epochs FROZEN THEN] [--depths] [--switches]

On the same images, with the same model, batch size and schedule, each in a process of its own: (a) the book's chapter 5 as a
user would write it; (b) the train stage, as `dvc repro` runs it; (c) the same model with a ready batch on the device. Images
a second are those of the training split over a whole epoch, validation included; the best epoch of the second phase
counts. The images are the photos of ARCHIVE, or ones made of noise, over and over. With a GPU and its goals the default is
the full set; on a CPU it is a few hundred. Exits with 1 if a goal is missed.
"""

import argparse
import json
import os
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

from benchmarks.photos import IMAGES, archive_of, photos
from breedline.params import Params, load_params
from breedline.shards import ShardSet
from breedline.tables import write_csv, write_json

ROOT = Path(__file__).parents[1]
CLASSES = 37
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
    {"precision": "fp16"},
    {"deterministic": True},
    {"keep_images": "ram"},
]
"""And on a GPU alone, as a CPU would say that it does otherwise, or nothing."""
START = {"imports": " when decoded: ", "images and model": " to validate, on ", "pictures and live log": " epochs of "}
"""What the train stage does before it trains, and what it says when it has done that."""
DEPTHS = ["resnet18", "resnet34", "resnet50", "resnet101", "convnext_tiny"]


def main(arguments: argparse.Namespace) -> bool:
    """Print the tables; whether every goal was met."""
    params = load_params(ROOT / "presets/pets.yaml")
    met = True
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _prepare(folder, photos(arguments.source, params.download), arguments.images, params)
        print(
            f"{arguments.images} images, {_device()}, {'+'.join(map(str, arguments.epochs))} epochs, best of the second phase"
        )
        for arch in arguments.arch:
            settings = _settings(params, arch, arguments.epochs)
            rows = {arm: _run(arm, folder, settings) for arm in ("book", "stage", "ceiling")}
            met &= _show(arch, rows, arguments)
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
    for file in sorted((folder / "files").iterdir()):
        file.rename(file.with_name(f"class{int(file.stem) % CLASSES:02d}_{file.name}"))
    sections = params.model_dump()
    sections["download"] |= {"sources": [{"url": str(archive)}]}
    sections["weights"] |= {"source": "none"}
    write_json(sections, folder / "params.yaml")  # which is YAML, too
    _stage(folder, "download", "--raw=raw")
    _stage(folder, "weights", "--arch=resnet18", "--weights=weights")
    table = ShardSet(folder / "raw").index[["name", "sha256"]]
    numbers = table["name"].str.extract(r"(\d+)")[0].astype(int)
    labels = "class" + (numbers % CLASSES).map("{:02d}".format)
    splits = numbers.map(lambda number: "valid" if number % 5 == 0 else "train")
    write_csv(table.assign(label=labels, split=splits), folder / "labels.csv")
    _stage(folder, "presize", "--raw=raw", "--labels=labels.csv", "--presized=presized")


def _settings(params: Params, arch: str, epochs: list[int]) -> dict[str, Any]:
    changes = {"arch": arch, "freeze_epochs": epochs[0], "epochs": epochs[1]}
    return params.train.model_dump() | changes


def _run(arm: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Images a second, gigabytes at the most, seconds in all and until each mark of START, of one arm."""
    began = time.perf_counter()
    if arm == "stage":
        sections = load_params(folder / "params.yaml").model_dump() | {"train": settings}
        write_json(sections, folder / "params.yaml")
        paths = ["--presized=presized", "--labels=labels.csv", "--weights=weights", "--item_size=460"]
        said, memory, start = _stage(
            folder, "train", *paths, "--bundle=models", "--metrics=train.json", "--report=report"
        )
    else:
        said, memory, start = _process(
            [sys.executable, "-m", __spec__.name, "--arm", arm, json.dumps(settings)], folder
        )
    seconds = time.perf_counter() - began
    epochs = [float(found) for found in re.findall(r"epoch \d+/\d+:.* ([\d.]+) s\b", said)]
    images = len(list((folder / "files").iterdir()))
    if peak := re.search(r"at most ([\d.]+) GB of the GPU", said):
        memory = float(peak[1])
    training = images - -(-images // 5)
    return {
        "speed": training / min(epochs[settings["freeze_epochs"] :]),
        "memory": memory,
        "seconds": seconds,
        "start": start,
    }


def _show(arch: str, rows: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> bool:
    table = Table(title=arch)
    for column in ("", "images/s", "GB", "seconds in all", "of it before training"):
        table.add_column(column, justify="right" if column else "left")
    for arm, row in rows.items():
        figures = (row["speed"], row["memory"], row["seconds"], row["start"]["pictures and live log"])
        table.add_row(arm, *(f"{figure:.1f}" for figure in figures))
    Console().print(table)
    marks = rows["stage"]["start"]
    parts = [end - begin for begin, end in pairwise([0, *marks.values()])]
    said = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in zip(marks, parts, strict=True))
    print(f"the stage before training: {said}")
    met = _goal(f"{arch}: times the book", rows["stage"]["speed"] / rows["book"]["speed"], least=TIMES_THE_BOOK)
    full = ON_GPU and arguments.images == IMAGES
    part = rows["stage"]["speed"] / rows["ceiling"]["speed"]
    met &= _goal(f"{arch}: of the ceiling", part, least=PART_OF_THE_CEILING if ON_GPU else 0)
    if full and arguments.epochs == [3, 6] and arch in SECONDS_OF_THE_STAGE:
        met &= _goal(f"{arch}: seconds of the stage", rows["stage"]["seconds"], most=SECONDS_OF_THE_STAGE[arch])
    return met


def _goal(what: str, value: float, least: float = 0, most: float = float("inf")) -> bool:
    met = least <= value <= most
    goal = f"at least {least:g}" if least else f"at most {most:g}" if most < float("inf") else ""
    print(f"{what:<40} {value:8.2f} {goal:<14} {'' if met else 'MISSED'}".rstrip(), flush=True)
    return met


def _show_switches(folder: Path, settings: dict[str, Any]) -> None:
    table = Table("switch", "images/s", "GB", "seconds in all", title=f"{settings['arch']}, one setting turned round")
    for change in [{}, *SWITCHES, *(GPU_SWITCHES if ON_GPU else [])]:
        row = _run("stage", folder, settings | change)
        name = ", ".join(f"{key}: {value}" for key, value in change.items()) or "as it is"
        table.add_row(name, *(f"{row[figure]:.1f}" for figure in ("speed", "memory", "seconds")))
    Console().print(table)


def _show_depths(folder: Path, params: Params) -> None:
    from breedline.learner import create_model

    table = Table("train.arch", "parameters", "images/s", "GB", title="the model alone, batches of 16")
    for arch in DEPTHS:
        row = _run("ceiling", folder, _settings(params, arch, [1, 1]) | {"batch_size": 16})
        millions = sum(weights.numel() for weights in create_model(arch, CLASSES).parameters()) / 1e6
        table.add_row(arch, f"{millions:.1f} M", f"{row['speed']:.1f}", f"{row['memory']:.1f}")
    Console().print(table)


def _stage(folder: Path, name: str, *options: str) -> tuple[str, float, dict[str, float]]:
    return _process([sys.executable, "-m", f"stages.{name}", *options], folder)


def _process(command: list[str], folder: Path) -> tuple[str, float, dict[str, float]]:
    """What it says, the most memory of it and its children in GB, and the seconds until each mark of START."""
    caches = {"BREEDLINE_CACHE": folder / "cache", "TORCHINDUCTOR_CACHE_DIR": folder / "inductor"}
    environment = os.environ | {"PYTHONPATH": str(ROOT), **{name: str(path) for name, path in caches.items()}}
    began, peak = time.perf_counter(), 0.0
    start: dict[str, float] = {}
    log = folder / "log"
    with (
        log.open("w") as output,
        psutil.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output) as process,
    ):
        while process.poll() is None:
            time.sleep(0.1)
            try:
                peak = max(peak, sum(each.memory_info().rss for each in [process, *process.children(recursive=True)]))
            except psutil.NoSuchProcess:  # it ends when it likes
                continue
            so_far = log.read_text()
            for what, mark in START.items():
                if mark in so_far:
                    start.setdefault(what, time.perf_counter() - began)
    said = log.read_text()
    if process.returncode:
        sys.exit(said)
    return said, peak / 1e9, start


def _book(settings: dict[str, Any]) -> None:
    """Chapter 5 of the book, with the photos as files; without weights, which have to be fetched."""
    from fastai.vision import all as book

    pets = book.DataBlock(
        blocks=(book.ImageBlock, book.CategoryBlock),
        get_items=book.get_image_files,
        splitter=book.FuncSplitter(_is_valid),
        get_y=book.using_attr(book.RegexLabeller(r"(.+)_\d+.jpg$"), "name"),
        item_tfms=book.Resize(460),
        batch_tfms=book.aug_transforms(size=224, min_scale=0.75),
    )
    dls = pets.dataloaders(Path("files"), bs=settings["batch_size"])
    learn = book.vision_learner(dls, getattr(book, settings["arch"]), metrics=book.error_rate, pretrained=False)
    _fit(learn.to_fp16() if ON_GPU else learn, settings)


def _is_valid(file: Path) -> bool:
    return int(file.stem.rsplit("_")[-1]) % 5 == 0


def _ceiling(settings: dict[str, Any]) -> None:
    """One batch, again and again."""
    from fastai.data.core import DataLoaders

    from breedline.learner import create_learner, create_model, loss_function, pick_device, pick_precision, prefer_speed

    device = pick_device()
    prefer_speed(device)
    images = len(list(Path("files").iterdir()))
    size, batch = settings["image_size"], settings["batch_size"]
    valid = -(-images // 5)
    dls = DataLoaders(
        *(
            Ready(count, torch.rand(batch, 3, size, size).to(device).to(memory_format=torch.channels_last), device)
            for count in ((images - valid) // batch, -(-valid // batch))
        ),
        device=device,
    )
    model, loss = create_model(settings["arch"], CLASSES), loss_function("cross_entropy")
    precision = pick_precision(settings["precision"], device)
    _fit(create_learner(dls, model, settings["arch"], loss, precision=precision, channels_last=True), settings)


class Ready:
    """A loader that has nothing to load."""

    def __init__(self, batches: int, images: torch.Tensor, device: torch.device) -> None:
        self.batches, self.device, self.n_inp = batches, device, 1
        self.batch = images, torch.zeros(len(images), dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterable[Any]:
        return iter([self.batch] * self.batches)


def _fit(learn: Any, settings: dict[str, Any]) -> None:
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
        learn.fine_tune(settings["epochs"], 2e-3, freeze_epochs=settings["freeze_epochs"])
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
    parser.add_argument("--arm", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        {"book": _book, "ceiling": _ceiling}[arguments.arm[0]](json.loads(arguments.arm[1]))
        sys.exit()
    sys.exit(not main(arguments))
