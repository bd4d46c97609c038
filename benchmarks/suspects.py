"""How many wrong labels the suspects stage finds, what that costs, and what their correction gains.

    python -m benchmarks.suspects [--source ARCHIVE] [--seeds N] [--labels CSV --truth CSV [--data FOLDER]]

- The embedded digits, and the pets of --source: in each seed 5 % of the labels are flipped to another class at random.
  Among the first N suspects, N the number of flips, how many are flips? Beside it the plain way: the images by their loss
  in a logistic regression that has seen their labels, on the same features and pixels.
- What correcting the first N suspects gains on the digits: a head, fitted to features of the frozen body with the wrong
  labels and with the corrected ones, on the same test images with true labels. All else in training is left out, as it takes
  minutes.
- --labels with wrong labels, --truth with the right ones (name, label, split, sha256, as in data/labels.csv), about the
  images in --data (presized and weights, by params.yaml): the same figures, average precision, and the seconds of the
  suspects and train stages, each a process of its own.

Exits with 1 if a goal is missed.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from benchmarks.goals import goal
from benchmarks.workspace import ROOT, cost_of, environment, seconds_of, stage, write_params
from breedline.checkpoints import Checkpoints
from breedline.items import Item, load_items
from breedline.losses import loss_function
from breedline.params import load_params
from breedline.probe import logistic_regression
from breedline.ridge import scaled
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from breedline.suspects import judge, out_of_sample
from breedline.tables import read_csv
from breedline.views import Geometry
from breedline.zoo import statistics
from stages.suspects import seen

FLIPPED = 0.05
PENALTY = 0.1
"""Of the head that is fitted to show the gain; the train stage would choose it by cross-validation."""
ITEM_COLUMNS = ["name", "label", "split", "sha256"]
CPU = torch.device("cpu")


def main(arguments: argparse.Namespace) -> bool:
    """Print the tables; whether every goal was met."""
    met = []
    with TemporaryDirectory() as temporary:
        for name in ["digits", *(["pets"] if arguments.source else [])]:
            folder = Path(temporary) / name
            _prepare(folder, name, arguments.source)
            met.append(_flips(folder, name, arguments.seeds))
        if arguments.labels:
            met.append(_known(arguments, Path(temporary)))
    return all(met)


def _prepare(folder: Path, name: str, source: Path | None) -> None:
    """The images and the weights, by the stages with the settings of the preset, but for the architecture of the weights."""
    sections = load_params(ROOT / ("params.yaml" if name == "digits" else "presets/pets.yaml")).model_dump()
    if name == "pets" and source:
        sections["download"] |= {"sources": [{"url": str(source.resolve()), "include": ["*.jpg"]}]}
        sections["train"] |= {"arch": load_params(ROOT / "params.yaml").train.arch}
        sections["label"] |= {"min_per_class": 1, "classes": None}
    write_params(folder, sections)
    (folder / "corrections.csv").write_text("name,sha256,action,label,reason\n")
    outputs = [f"--{name}={name}.csv" for name in ("labels", "rejected", "classes")]
    for command in (
        stage("download", "--raw=raw"),
        stage("weights", f"--arch={sections['train']['arch']}", "--weights=weights"),
        stage("label", "--raw=raw", "--corrections=corrections.csv", *outputs, "--metrics=label.json"),
        stage("presize", "--raw=raw", "--labels=labels.csv", "--presized=presized"),
    ):
        seconds_of(command, folder)


def _flips(folder: Path, name: str, seeds: int) -> bool:
    """The table of one data set with flipped labels; for the digits also the gain."""
    params = load_params(folder / "params.yaml")
    images = ShardSet(folder / "presized", PRESIZED_COLUMNS)
    items = load_items(images, read_csv(folder / "labels.csv", ITEM_COLUMNS).drop_duplicates("sha256"))
    arch, size = params.train.arch, params.train.image_size
    geometry = Geometry(params.presize.shorter_side, size, *statistics(arch))
    checkpoints = Checkpoints({"benchmark": name})
    checkpoints.clear()
    views = seen(
        *(items, folder / "presized", arch, folder / "weights", geometry, params.suspects.batch_size), checkpoints
    )
    classes, true = np.unique([item.label for item in items], return_inverse=True)
    rows, right = [], []
    for seed in range(1, seeds + 1):
        given = _flipped(true, seed)
        found = judge(out_of_sample(views, given, len(classes), [item.sha256 for item in items]), given)
        rows.append(_figures(found, given != true) | {"in-sample": _in_sample(views, given, given != true)})
        corrected = given.copy()
        first = found["row"].to_numpy(np.int64)[: int((given != true).sum())]
        corrected[first] = true[first]
        if name == "digits":
            right.append([_right(views[0], labels, true, items) for labels in (given, corrected)])
    _show(f"{name}: {len(items)} images, {len(classes)} classes, 5 % flipped", rows)
    recall = pd.DataFrame(rows)["recall at 1x"].mean()
    met = goal(f"{name}: flips among the first N suspects", recall, least=0.97 if name == "digits" else -np.inf)
    if right:
        before, after = np.mean(right, axis=0)  # (test images,) each: in how many of the seeds it is right
        interval = bootstrap((after - before,), np.mean, rng=np.random.default_rng(0)).confidence_interval
        print(
            f"a head on {len(before)} test images: accuracy {before.mean():.4f} with the wrong labels, {after.mean():.4f} with "
            f"the first N suspects corrected: {(after - before).mean():+.4f}, 95 % interval {interval.low:+.4f} to {interval.high:+.4f}"
        )
    return met


def _flipped(true: np.ndarray, seed: int) -> np.ndarray:
    random, classes = np.random.default_rng(seed), int(true.max()) + 1
    rows = random.choice(len(true), round(FLIPPED * len(true)), replace=False)
    given = true.copy()
    given[rows] = (true[rows] + random.integers(1, classes, len(rows))) % classes
    return given


def _figures(found: pd.DataFrame, wrong: np.ndarray) -> dict[str, float]:
    """What the suspects are worth, when these images (of truth values) are wrong."""
    ranked, count = wrong[found["row"].to_numpy(np.int64)], int(wrong.sum())
    cut = found["likely"].to_numpy(bool)
    return {
        "AP": float(average_precision_score(ranked, -np.arange(len(ranked)))),
        "recall at 1x": ranked[:count].sum() / count,
        "recall at 2x": ranked[: 2 * count].sum() / count,
        "cut": float(cut.sum()),
        "precision of the cut": ranked[cut].mean() if cut.any() else 0.0,
        "recall of the cut": ranked[cut].sum() / count,
    }


def _in_sample(views: list[np.ndarray], given: np.ndarray, wrong: np.ndarray) -> float:
    """Recall at 1x of the plain way."""
    inputs = np.hstack([scaled(view) * np.sqrt(view.shape[1]) for view in views])
    probabilities = LogisticRegression(max_iter=300).fit(inputs, given).predict_proba(inputs)
    worst = probabilities[np.arange(len(given)), given].argsort()[: int(wrong.sum())]
    return float(wrong[worst].mean())


def _right(features: np.ndarray, labels: np.ndarray, true: np.ndarray, items: list[Item]) -> np.ndarray:
    """Whether each test image is classified right by a head that was fitted to the others with `labels`."""
    test = np.array([item.split == "test" for item in items])
    rows, targets = torch.from_numpy(features), torch.from_numpy(labels)
    loss = loss_function("cross_entropy", 0.0, "none")
    weight, bias = next(logistic_regression(rows[~test], targets[~test], [PENALTY], int(true.max()) + 1, loss))
    return (torch.nn.functional.linear(rows[test], weight, bias).argmax(1).numpy() == true[test]).astype(float)


def _show(title: str, rows: list[dict[str, float]]) -> None:
    table = Table("", "mean", "least", "most", title=title)
    for name, values in pd.DataFrame(rows).items():
        table.add_row(str(name), *(f"{value:.4g}" for value in (values.mean(), values.min(), values.max())))
    Console().print(table)


def _known(arguments: argparse.Namespace, folder: Path) -> bool:
    """The figures of a table of labels whose truth is known, and the seconds of the stages."""
    params, data = load_params(Path("params.yaml")), arguments.data.resolve()
    sections: dict[str, Any] = params.model_dump()
    sections["suspects"] |= {"most": 100_000}
    write_params(folder, sections)
    side = params.presize.shorter_side
    inputs = [f"--presized={data / 'presized'}", f"--weights={data / 'weights'}", f"--item_size={side}"]
    inputs.append(f"--labels={arguments.labels.resolve()}")
    body = [f"--arch={params.train.arch}", f"--image_size={params.train.image_size}"]
    tables = ["--suspects=suspects.csv", "--near_duplicates=near_duplicates.csv", "--metrics=suspects.json"]
    ours = cost_of(stage("suspects", *inputs, *body, *tables), folder, environment(folder))
    outputs = ["--trained=trained", "--metrics=train.json", "--report=train"]
    training = cost_of(stage("train", *inputs, *outputs), folder, environment(folder))
    found = read_csv(folder / "suspects.csv", ["sha256", "label", "likely"])
    truth = read_csv(arguments.truth, ["sha256", "label"]).drop_duplicates("sha256").set_index("sha256")["label"]
    wrong = (found["label"] != truth[found["sha256"]].to_numpy()).to_numpy()
    judged = pd.DataFrame({"row": range(len(found)), "likely": found["likely"] == "True"})
    _show(f"{arguments.labels.name}: {len(found)} images, {wrong.sum()} wrong labels", [_figures(judged, wrong)])
    print(f"seconds of the processor: suspects {ours.cpu:.1f}, train {training.cpu:.1f}")
    return goal("suspects: share of the training's seconds", ours.cpu / training.cpu, most=0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suspects", description=main.__doc__)
    parser.add_argument("--source", type=Path, help="an archive of photos that are named like the Oxford-IIIT Pets")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--labels", type=Path, help="a table with wrong labels")
    parser.add_argument("--truth", type=Path, help="the same with the right ones")
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of presized and weights")
    arguments = parser.parse_args()
    if bool(arguments.labels) != bool(arguments.truth):
        parser.error("--labels and --truth go together")
    sys.exit(not main(arguments))
