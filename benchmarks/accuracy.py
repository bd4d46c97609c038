"""How accurate a model of few photos is, and what it costs: against fast.ai's book, and against the fitted head alone.

    python -m benchmarks.accuracy [--source ARCHIVE] [--photos ARCHIVE] [--data NAME …] [--seeds N] [--arms NAME …]
                                  [--book-epochs FROZEN THEN] [--jobs N] [--out CSV] [--picture PNG]

On the same splits, from the same pretrained body, each a process of its own: `ours`, the train stage with the settings of
presets/photos.yaml; `probe`, the same with `epochs: 0`; `book`, chapter 5 as its reader would write it (benchmarks/book.py).
Seconds are those of the whole training process, imports included. The data sets:

- pets: the photos of --source, named like the Oxford-IIIT Pets; the book has --book-epochs.
- digits: those that are embedded.
- photos-10, -30, -100, -200: so many labelled photos a class, 15 % of them to validate, and 100 others a class to test,
  drawn from --photos, whose folders are the labels.

In all but the pets the book trains for about as many seconds as ours took. Another seed is another split. With --out each
result is kept as soon as it is there, and what the table has already is not computed again. Exits with 1 if a goal is missed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from benchmarks.goals import goal
from benchmarks.workspace import ROOT, keep_bytecode, seconds_of, stage, write_params
from breedline.params import Params, load_params
from breedline.pictures import BLUE, VERMILION
from breedline.tables import read_csv, write_csv

ARMS = ("ours", "probe", "book")
PHOTOS = (10, 30, 100, 200)
TESTED = 100
"""Photos of each class in the test split of photos-N."""
NAMES = {"book": "the book's code", "probe": "our head alone", "ours": "ours"}
COLUMNS = ["data", "seed", "arm", "accuracy", "seconds", "epochs"]
WARM_UP = "import benchmarks.book, breedline.finetune, stages.evaluate, stages.train"


@dataclass(frozen=True)
class Images:
    """Where images come from, and the settings in which they differ from presets/photos.yaml."""

    url: str
    item_size: int
    image_size: int
    label: dict[str, Any] = field(default_factory=dict)
    augment: dict[str, Any] = field(default_factory=dict)
    precision: str = "auto"
    """At the small sizes fp32: bf16 takes longer there on a CPU."""


class Results:
    """A table of what was measured, written anew with each row."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        self.table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)

    def seconds(self, data: str, seed: int, arm: str) -> float | None:
        """What the training of this row took; None if there is no such row."""
        with self.lock:
            found = self.table.query("data == @data and seed == @seed and arm == @arm")
        return None if found.empty else float(found["seconds"].iloc[-1])

    def add(self, *values: Any) -> None:
        """Add a row, its values in the order of COLUMNS."""
        row = pd.DataFrame([values], columns=COLUMNS)
        with self.lock:
            self.table = row if self.table.empty else pd.concat([self.table, row], ignore_index=True)
            write_csv(self.table, self.path)
            print("{}, seed {}, {}: test accuracy {:.4f}, {:.1f} s, {} epochs".format(*values), flush=True)


def main(arguments: argparse.Namespace) -> bool:
    """Print a table for each data set; whether every goal was met."""
    params = load_params(ROOT / "presets/photos.yaml")
    seeds = range(1, arguments.seeds + 1)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        keep_bytecode(folder / "bytecode")
        results = Results((arguments.out or folder / "results.csv").resolve())
        wanted = [
            (data, seed)
            for seed in seeds
            for data in arguments.data
            if not all(results.seconds(data, seed, arm) for arm in arguments.arms)
        ]
        kinds = sorted({_kind(data) for data, _ in wanted})
        images = {kind: _images(kind, arguments) for kind in kinds}
        if wanted:
            seconds_of([sys.executable, "-c", WARM_UP], folder)
        for kind in kinds:
            _prepare(folder / kind, images[kind], params)
        with ThreadPoolExecutor(arguments.jobs, initializer=_take_cores, initargs=(_shares(arguments.jobs),)) as pool:
            list(
                pool.map(
                    lambda split: _one_split(split[0], split[1], folder / _kind(split[0]), arguments, results), wanted
                )
            )
    met = [_show(data, seeds, arguments.arms, results) for data in arguments.data]
    if arguments.picture:
        _draw(results.table, arguments.data, arguments.picture)
    return all(met)


def _kind(data: str) -> str:
    return data.partition("-")[0]


def _images(kind: str, arguments: argparse.Namespace) -> Images:
    if kind == "digits":
        gentle = {"flip": False, "max_warp": 0.1, "min_scale": 0.9}
        return Images("digits", item_size=64, image_size=64, augment=gentle, precision="fp32")
    archive = arguments.source if kind == "pets" else arguments.photos
    if not archive:
        sys.exit(f"{kind} are in no package: name their archive with {'--source' if kind == 'pets' else '--photos'}")
    url = str(archive.resolve())
    if kind == "pets":
        return Images(url, item_size=460, image_size=288)
    folders = {"on": "path", "pattern": "(.*/)?(?P<label>[^/]+)/[^/]+"}
    return Images(url, item_size=128, image_size=96, label=folders, precision="fp32")


def _shares(jobs: int) -> "SimpleQueue[list[int]]":
    """The cores of this process, dealt out to the jobs."""
    cores = sorted(os.sched_getaffinity(0))
    shares: SimpleQueue[list[int]] = SimpleQueue()
    for job in range(jobs):
        shares.put(cores[job::jobs] or cores)
    return shares


def _take_cores(shares: "SimpleQueue[list[int]]") -> None:
    """Have this thread, and so the processes that it starts, run on its share only, whatever they think they have."""
    os.sched_setaffinity(0, shares.get())


def _prepare(folder: Path, images: Images, params: Params) -> None:
    """The images as a presized set and as files, the weights, and all labels."""
    sections = params.model_dump()
    sections["download"] |= {"sources": [{"url": images.url}]}
    sections["label"] |= images.label
    sections["presize"] |= {"shorter_side": images.item_size}
    sections["train"] |= {"image_size": images.image_size, "precision": images.precision}
    sections["train"]["augment"] |= images.augment
    write_params(folder, sections)
    (folder / "corrections.csv").write_text("name,sha256,action,label,reason\n")
    (folder / "duplicates.csv").write_text("sha256,leader\n")  # the book knows none either
    for command in (
        stage("download", "--raw=raw"),
        stage("weights", f"--arch={params.train.arch}", "--weights=weights"),
        _label(folder),
        stage("presize", "--raw=raw", "--labels=labels.csv", "--presized=presized"),
    ):
        seconds_of(command, folder)
    (folder / "files").mkdir()
    for volume in sorted((folder / "raw").glob("*.tar")):
        subprocess.run(["tar", "xf", volume, "-C", folder / "files"], check=True)


def _label(folder: Path) -> list[str]:
    outputs = {name: f"--{name}={name}.csv" for name in ("labels", "rejected", "classes")}
    tables = [f"--{name}={folder / name}.csv" for name in ("corrections", "duplicates")]
    return stage("label", f"--raw={folder / 'raw'}", *tables, *outputs.values(), "--metrics=label.json")


def _one_split(data: str, seed: int, images: Path, arguments: argparse.Namespace, results: Results) -> None:
    """Measure the arms that are not in the table yet, ours first: the book may need to know its seconds."""
    folder = images / f"{data}-{seed}"
    sections = load_params(images / "params.yaml").model_dump()
    sections["label"] |= {"seed": seed}
    write_params(folder, sections)
    if data.startswith("photos-"):
        every = read_csv(images / "labels.csv", ["name", "label", "sha256"])
        write_csv(_drawn(every, int(data.removeprefix("photos-")), seed), folder / "labels.csv")
    else:
        seconds_of(_label(images), folder)
    for arm in ARMS:
        if arm in arguments.arms and not results.seconds(data, seed, arm):
            if arm == "book":
                epochs = arguments.book_epochs if data == "pets" else None
                figures = _book(folder, images, epochs, results.seconds(data, seed, "ours"))
            else:
                figures = _stages(folder, images, arm)
            results.add(data, seed, arm, *figures)


def _drawn(table: pd.DataFrame, labelled: int, seed: int) -> pd.DataFrame:
    """TESTED images of each class to test, the same whatever `labelled` is, and so many others, of which 15 % validate."""
    parts = []
    for _, some in table.drop_duplicates("sha256").groupby("label"):
        if len(some) < TESTED + labelled:
            sys.exit(f"a class of --photos has {len(some)} images, and {TESTED + labelled} are needed")
        rows = list(some.index)
        random.Random(seed).shuffle(rows)  # noqa: S311 - no secret
        valid = max(1, round(0.15 * labelled))
        splits = ["test"] * TESTED + ["valid"] * valid + ["train"] * (labelled - valid)
        parts.append(some.loc[rows[: len(splits)]].assign(split=splits))
    return pd.concat(parts)


def _stages(split: Path, images: Path, arm: str) -> tuple[float, float, int]:
    """Test accuracy, seconds of the train stage, and its epochs.

    Args:
        split: the folder with this split's params.yaml and labels.csv.
        images: the folder with all else.
    """
    sections = load_params(split / "params.yaml").model_dump()
    if arm == "probe":
        sections["train"] |= {"epochs": 0}
    write_params(split / arm, sections)
    inputs = [f"--presized={images / 'presized'}", f"--labels={split / 'labels.csv'}"]
    more = [f"--weights={images / 'weights'}", f"--item_size={sections['presize']['shorter_side']}"]
    train = stage("train", *inputs, *more, "--trained=models", "--metrics=train.json", "--report=train")
    test = stage("evaluate", *inputs, "--trained=models", "--metrics=evaluate.json", "--report=evaluate")
    return _figures(split / arm, train, test)


def _book(split: Path, images: Path, epochs: list[int] | None, seconds: float | None) -> tuple[float, float, int]:
    """The same of the book: with its schedule of `epochs`, or for so many seconds."""
    if not epochs and not seconds:
        sys.exit("the book trains for as long as ours here: put ours among the --arms")
    write_params(split / "book", load_params(split / "params.yaml").model_dump())
    inputs = [f"--labels={split / 'labels.csv'}", f"--files={images / 'files'}", f"--weights={images / 'weights'}"]
    module = [sys.executable, "-m", "benchmarks.book"]
    schedule = ["--epochs", *map(str, epochs)] if epochs else [f"--until={time.time() + (seconds or 0)}"]
    return _figures(split / "book", [*module, "train", *inputs, *schedule], [*module, "test", *inputs])


def _figures(folder: Path, train: list[str], test: list[str]) -> tuple[float, float, int]:
    """Run both commands; what they leave in train.json and evaluate.json, and the seconds of the first."""
    seconds = seconds_of(train, folder)
    seconds_of(test, folder)
    trained, tested = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("train", "evaluate"))
    return tested["test"]["accuracy"], round(seconds, 2), trained["epochs"]


def _show(data: str, seeds: Sequence[int], arms: Sequence[str], results: Results) -> bool:
    """The table of one data set, and its goals."""
    rows = results.table.query("data == @data and arm in @arms and seed in @seeds")
    accuracy = rows.pivot_table(index="seed", columns="arm", values="accuracy")
    seconds = rows.groupby("arm")["seconds"].mean()
    table = Table("", "test accuracy", "95 % interval", "seconds", title=f"{data}, splits: {len(accuracy)}")
    for arm in (arm for arm in ARMS if arm in arms):
        table.add_row(arm, *_mean(accuracy[arm], ".4f"), f"{seconds[arm]:.1f}")
    more = {peer: accuracy["ours"] - accuracy[peer] for peer in ("probe", "book") if {"ours", peer} <= {*arms}}
    for peer, differences in more.items():
        table.add_row(f"ours - {peer}, paired", *_mean(differences, "+.4f"))
    Console().print(table)
    met = []
    many = data in ("photos-100", "photos-200")
    if data == "pets" and "ours" in arms:
        met.append(goal("pets: ours", accuracy["ours"].mean(), least=0.88))
    if "probe" in more:
        met.append(goal(f"{data}: ours above the probe", more["probe"].mean(), least=0.03 if many else -0.01))
    if "book" in more and (many or data == "pets"):
        met.append(goal(f"{data}: ours above the book", more["book"].mean(), least=0.2 if many else 0.15))
    if "book" in more and data == "pets":
        met.append(goal("pets: of the book's seconds", seconds["ours"] / seconds["book"], most=0.333))
    return all(met)


def _draw(table: pd.DataFrame, data: Sequence[str], path: Path) -> None:
    """Mean test accuracy of each arm on each data set, with its 95 % interval from three splits on, as a picture."""
    figure = Figure(figsize=(7.5, 0.8 + 0.62 * len(data)), layout="constrained")
    axes = figure.subplots()
    for arm, colour, mark, shift in (
        ("book", "0.45", "s", 0.2),
        ("probe", VERMILION, "D", 0),
        ("ours", BLUE, "o", -0.2),
    ):
        found = table[table["arm"] == arm].groupby("data")["accuracy"].agg(["mean", "sem", "count"]).reindex(list(data))
        half = (student.ppf(0.975, found["count"] - 1) * found["sem"]).where(found["count"] > 2)
        rows = [row + shift for row in range(len(data))]
        axes.errorbar(found["mean"], rows, xerr=half, fmt=mark, color=colour, capsize=3, label=NAMES[arm])
    axes.set_yticks(
        range(len(data)), [f"{name.replace('-', ', ')}{' a class' if '-' in name else ''}" for name in data]
    )
    axes.set(ylim=(len(data) - 0.5, -0.5), xlim=(0, 1), xlabel="test accuracy, mean of the splits and 95 % interval")
    axes.grid(axis="x", color="0.9")
    figure.legend(loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _mean(values: pd.Series, form: str) -> tuple[str, str]:
    """The mean, and half the width of its 95 % interval, by Student's t."""
    if len(values) < 2:
        return f"{values.mean():{form}}", "of one split none"
    return f"{values.mean():{form}}", f"± {student.ppf(0.975, len(values) - 1) * values.sem():.4f}"


if __name__ == "__main__":
    names = ["pets", "digits", *(f"photos-{count}" for count in PHOTOS)]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=main.__doc__)
    parser.add_argument("--source", type=Path, metavar="ARCHIVE", help="the pets")
    parser.add_argument("--photos", type=Path, metavar="ARCHIVE", help="photos in a folder for each class")
    parser.add_argument("--data", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=5, help="how many splits")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--book-epochs", nargs=2, type=int, default=[3, 6], metavar=("FROZEN", "THEN"))
    parser.add_argument("--jobs", type=int, default=1, help="trainings side by side, each on its share of the cores")
    parser.add_argument("--out", type=Path, metavar="CSV", help="keep the results there, and go on from what is there")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the means there")
    sys.exit(not main(parser.parse_args()))
