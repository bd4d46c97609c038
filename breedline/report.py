"""What the pipeline has found, as one page for people: the numbers, the mistakes, the data, and how to make it again.

An answer is a row of a table: what an image is (`actual`), what the model takes it for (`predicted`), how sure it is
(`probability`), the loss, and the content hash of the raw file.
"""

import base64
import io
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import pandas as pd
from PIL import Image
from pydantic import AfterValidator, BaseModel, Field, RootModel, model_validator

from breedline.charts import curves, reliability
from breedline.document import Thumbnails
from breedline.errors import BreedlineError
from breedline.files import sha256_of
from breedline.images import DAMAGE
from breedline.intervals import Interval, bootstrapped, wilson
from breedline.items import load_items
from breedline.metrics import by_confidence, confused_pairs, confusion, gap
from breedline.params import Params
from breedline.shards import ShardSet
from breedline.tables import read_csv
from breedline.urls import redacted

MATRIX = 100
"""Classes at most in the confusion matrix; of more, those that the model knows least."""
ROWS = 500
"""At most of any other table; the tables of the pipeline have the others."""
CARDS, PAIRS = 24, 12
"""Mistakes and suspects that are shown, each, and pairs of near-duplicates."""
AGREES = 1e-3
"""By how much a number that is computed again may differ from the metric, which is of probabilities that are not rounded."""
STEPS = 100
"""Thresholds of the curve."""
LARGE = 1e12
"""No number of the metrics is as large."""
SHADES = 6
"""Of a cell of the confusion matrix."""


def _within_reason(number: float) -> float:
    if not -LARGE < number < LARGE:  # nor if it is no number
        raise ValueError("it is too large, or no number")
    return number


Number = Annotated[int | float, AfterValidator(_within_reason)]


class Calibration(BaseModel):
    """What evaluate has found of the confidence."""

    none_below: float = Field(ge=0, le=1)


def _has_the_usual(split: dict[str, float]) -> dict[str, float]:
    if missing := {"accuracy", "macro_f1", "log_loss", "calibration_error", "images"} - split.keys():
        raise ValueError(f"it lacks {min(missing)}")
    if not all(0 <= value <= 1 for name, value in split.items() if _is_share(name)):
        raise ValueError("a share is none")
    return split


def _is_share(metric: str) -> bool:
    return metric.endswith("accuracy") or metric == "none_of_them"


class Evaluated(BaseModel):
    """The metrics of evaluate, as far as the report needs them."""

    test: Annotated[dict[str, Number], AfterValidator(_has_the_usual)]
    valid: dict[str, Number] = {}
    calibration: Calibration


class Scores(BaseModel):
    """How well a model does on the validation images."""

    valid_loss: Number
    accuracy: Number


class Machine(BaseModel):
    """What a model was trained on."""

    device: str
    precision: str
    torch: str
    fastai: str
    timm: str


class Trained(BaseModel):
    """The metrics of train, as far as the report needs them."""

    epochs: int
    valid_loss: Number | None = None
    accuracy: Number | None = None
    head: Scores | None = None
    fine_tuned: Scores | None = None
    share: Number | None = None
    batch_size: int | None = None
    machine: Machine | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        both = (self.head, self.fine_tuned, self.share)
        if both.count(None) not in (0, len(both)):
            raise ValueError("it has only a part of head, fine_tuned and share")
        if (self.head or not self.epochs) and None in (self.valid_loss, self.accuracy):
            raise ValueError("it lacks valid_loss or accuracy")
        return self


class Labelled(RootModel[dict[str, Any]]):
    """The metrics of label: counts, some of them nested."""


@dataclass(frozen=True)
class Answers:
    """What the model says of the test images, and the numbers of that."""

    table: pd.DataFrame
    scores: pd.DataFrame
    """Of each class, from the lowest F1: class, precision, recall, f1, images."""
    metrics: Evaluated

    @property
    def wrong(self) -> pd.DataFrame:
        """The mistakes, those with the highest loss first."""
        return self._sorted(self.table["actual"] != self.table["predicted"], "loss", ascending=False)

    @property
    def right(self) -> pd.DataFrame:
        """The answers that are right, the least sure first."""
        return self._sorted(self.table["actual"] == self.table["predicted"], "probability", ascending=True)

    def _sorted(self, which: "pd.Series[bool]", by: str, *, ascending: bool) -> pd.DataFrame:
        return self.table[which].sort_values(by, ascending=ascending, kind="stable")


def read_answers(images: ShardSet, labels: pd.DataFrame, evaluation: Path, metrics: Evaluated) -> Answers:
    """The predictions in evaluate's report `evaluation`, and the content hash of each.

    Raises:
        BreedlineError: they are of other images than the test split of `labels`, or damaged.
    """
    columns, numbers = ["name", "actual", "predicted", "probability", "loss"], ["probability", "loss"]
    table = read_csv(evaluation / "predictions.csv", columns, numbers=numbers)
    tested = [item for item in load_items(images, labels) if item.split == "test"]
    if [item.name for item in tested] != table["name"].tolist():
        raise BreedlineError(f"{evaluation} is of other images than the labels: run `dvc repro`")
    columns = ["class", "precision", "recall", "f1", "images"]
    scores = read_csv(evaluation / "per_class.csv", columns, ["images"], numbers=["f1"])
    known = scores["class"].is_unique and table[["actual", "predicted"]].isin(set(scores["class"])).all(axis=None)
    if (
        table.empty
        or len(table) != metrics.test["images"]
        or not known
        or not table["probability"].between(0, 1).all()
        or (scores["images"] < 0).any()
    ):
        raise BreedlineError(f"{evaluation} is damaged: `dvc checkout` restores it, or `dvc repro` makes it anew")
    return Answers(table.assign(sha256=[item.sha256 for item in tested]), scores, metrics)


def pictured(answers: Answers, suspects: pd.DataFrame, pairs: pd.DataFrame, most: int) -> Iterator[str]:
    """The content hashes of the images to show, the most telling first; some of them more than once."""
    wrong = answers.wrong["sha256"]
    right = answers.right.assign(place=answers.right.groupby("actual").cumcount())
    return chain(
        wrong.head(most // 2),
        suspects["sha256"].head(CARDS),
        chain.from_iterable(zip(pairs["sha256"].head(PAIRS), pairs["other_sha256"].head(PAIRS), strict=True)),
        wrong,
        right.sort_values("place", kind="stable")["sha256"],  # from each class in turn
    )


# The numbers


def headline(answers: Answers) -> list[dict[str, Any]]:
    """The metrics of both splits, those of the test split with an interval where there is one."""
    test, valid = answers.metrics.test, answers.metrics.valid
    names = [name for name in test if name not in ("images", "error_rate") and not name.endswith("_before")]
    intervals = _intervals(answers)
    return [
        {
            "name": name.replace("_", " ").replace("f1", "F1").replace("top ", "top-"),
            "lower": name in ("log_loss", "calibration_error"),
            "share": name not in ("log_loss", "macro_f1", "calibration_error"),
            "value": test[name],
            "interval": intervals.get(name),
            "valid": valid.get(name),
            "before": test.get(f"{name}_before"),
        }
        for name in names
    ]


def _intervals(answers: Answers) -> dict[str, Interval | None]:
    test, table = answers.metrics.test, answers.table
    shares = {name: test[name] for name in test if _is_share(name)}
    found = {name: wilson(round(share * test["images"]), int(test["images"])) for name, share in shares.items()}
    names = pd.Index(answers.scores["class"])
    actual, predicted = names.get_indexer(table["actual"]), names.get_indexer(table["predicted"])
    statistics: dict[str, tuple[Any, ...]] = {
        "macro_f1": (_macro_f1, actual, predicted),
        "log_loss": (np.mean, table["loss"].to_numpy()),
        "calibration_error": (_calibration_error, table["probability"].to_numpy(), actual == predicted),
    }
    for name, (statistic, *columns) in statistics.items():
        # where each class has a probability of its own, log loss is of scaled ones, which the table lacks
        if abs(statistic(*columns) - test[name]) < AGREES:
            found[name] = bootstrapped(statistic, *columns)
    return found


def _macro_f1(actual: np.ndarray, predicted: np.ndarray) -> float:
    classes = int(max(actual.max(), predicted.max())) + 1
    right, images, taken = (
        np.bincount(which, minlength=classes) for which in (actual[actual == predicted], actual, predicted)
    )
    return float((2 * right[images > 0] / (images + taken)[images > 0]).mean())


def _calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    return gap(*by_confidence(confidence, right))


def class_rows(answers: Answers, counts: pd.DataFrame) -> list[dict[str, Any]]:
    """Each class, from the lowest F1, with Wilson's intervals and the class that it is most often taken for.

    Args:
        counts: how many images of each class there are (class, train, valid, test).
    """
    table = answers.table
    right = table.loc[table["actual"] == table["predicted"], "actual"].value_counts()
    taken = table["predicted"].value_counts()
    trained = dict(zip(counts["class"], counts["train"], strict=True))
    pairs = confused_pairs(table).drop_duplicates("actual")
    other = {actual: (predicted, times) for actual, predicted, times in pairs.itertuples(index=False)}
    rows = []
    for name, f1, images in answers.scores[["class", "f1", "images"]].head(ROWS).itertuples(index=False):
        correct = int(right.get(name, 0))
        rows.append(
            {
                "name": name,
                "train": int(trained.get(name, 0)),
                "images": images,
                "f1": f1 if images else None,
                "recall": _share(correct, images),
                "precision": _share(correct, int(taken.get(name, 0))),
                "other": other.get(name),
            }
        )
    return rows


def _share(right: int, of: int) -> dict[str, Any] | None:
    """The share `right / of` with its interval; None where it is of nothing."""
    interval = wilson(right, of)
    if interval is None:
        return None
    return {"right": right, "of": of, "value": right / of, "interval": interval}


# The charts


def learning(training: Path) -> dict[str, Any] | None:
    """The curves of a training by epoch, as charts and as a table; None of a head that is published alone."""
    folder = training / "live" / "plots" / "metrics"
    names = {"train_loss": "training", "valid_loss": "validation", "accuracy": "accuracy"}
    if not all((folder / f"{name}.tsv").is_file() for name in names):
        return None
    tables = [
        read_csv(folder / f"{name}.tsv", ["step", name], ["step"], numbers=[name], separator="\t") for name in names
    ]
    columns = [table.drop_duplicates("step").set_index("step")[name] for name, table in zip(names, tables, strict=True)]
    table = pd.concat(columns, axis=1).rename(columns=names).rename_axis("epoch").sort_index()
    return {
        "loss": curves(table[["training", "validation"]]),
        "accuracy": curves(table[["accuracy"]], share=True),
        "rows": [(epoch, *row) for epoch, *row in table.astype(object).where(table.notna(), None).itertuples()],
    }


def calibration(answers: Answers) -> dict[str, Any]:
    """How often the answers of each confidence are right, as a chart and as a table."""
    confidence = answers.table["probability"].to_numpy()
    right = (answers.table["actual"] == answers.table["predicted"]).to_numpy()
    rows = [
        {
            "images": images,
            "confidence": sure / images,
            "accuracy": correct / images,
            "interval": wilson(correct, images),
        }
        for images, sure, correct in zip(*by_confidence(confidence, right), strict=True)
        if images
    ]
    table = pd.DataFrame(rows)
    table[["low", "high"]] = table.pop("interval").tolist()
    return {"chart": reliability(table), "rows": rows}


def thresholds(answers: Answers) -> dict[str, Any]:
    """The share of images kept and how many of them are right, for each threshold of none-of-these; the chosen one too."""
    chosen = answers.metrics.calibration.none_below
    confidence = answers.table["probability"]
    right = answers.table["actual"] == answers.table["predicted"]

    def at(threshold: float) -> tuple[float, float, float | None]:
        kept = confidence >= threshold
        return threshold, float(kept.mean()), float(right[kept].mean()) if kept.any() else None

    steps = np.unique(np.append(np.linspace(min(confidence.min(), chosen), 1, STEPS), chosen))
    curve = pd.DataFrame(map(at, steps), columns=["threshold", "images kept", "right among them"]).astype(float)
    told = sorted({0.0, 0.5, 0.8, 0.9, 0.95, 0.99, chosen})
    return {
        "chart": curves(curve.set_index("threshold"), share=True, mark=chosen),
        "rows": list(map(at, told)),
        "chosen": chosen,
    }


def training_pictures(training: Path) -> list[tuple[str, str]]:
    """What train has drawn of its schedule and its search for a learning rate: (what it is, WebP in base64)."""
    known = {"schedule.png": "Learning rates and momentum, batch by batch", "lr_find.png": "The learning-rate finder"}
    found = []
    for name, title in known.items():
        if (training / name).is_file():
            buffer = io.BytesIO()
            try:
                with Image.open(training / name, formats=["PNG"]) as image:
                    image.convert("RGB").save(buffer, "WEBP", lossless=True)
            except (*DAMAGE, Image.DecompressionBombError):
                continue
            found.append((title, base64.b64encode(buffer.getvalue()).decode()))
    return found


# The confusion matrix


def matrix(answers: Answers, thumbnails: Thumbnails) -> dict[str, Any]:
    """Rows of cells, classes that are confused side by side, and for each cell that has any its pictures."""
    classes = list(answers.scores.loc[answers.scores["images"] > 0, "class"].head(MATRIX))
    counts = confusion(answers.table, classes)
    numbers = counts.to_numpy()
    shares = numbers / np.maximum(numbers.sum(axis=1), 1)[:, None]
    shades = np.ceil(SHADES * np.sqrt(shares)).astype(int)  # the root lifts what is rare, which is what one looks for
    by_cell = dict(iter(pd.concat([answers.wrong, answers.right]).groupby(["actual", "predicted"], sort=False)))
    galleries, rows = [], []
    for row, actual in enumerate(counts.index):
        cells = []
        for column, predicted in enumerate(counts.columns):
            number, name = int(numbers[row, column]), None
            shown = [one for one in _records(by_cell.get((actual, predicted))) if one["sha256"] in thumbnails]
            if shown:
                name = f"cell-{row}-{column}"
                galleries.append(
                    {"id": name, "actual": actual, "predicted": predicted, "number": number, "shown": shown}
                )
            cells.append({"number": number, "shade": int(shades[row, column]), "right": row == column, "id": name})
        rows.append({"name": actual, "cells": cells})
    return {"classes": list(counts.columns), "rows": rows, "galleries": galleries, "of": len(answers.scores)}


def mistakes(answers: Answers, thumbnails: Thumbnails) -> dict[str, Any]:
    """The worst of the mistakes, as far as there are pictures of them, and how many there are."""
    wrong = answers.wrong
    return {"shown": _records(wrong[wrong["sha256"].isin(list(thumbnails))].head(CARDS)), "all": len(wrong)}


def suspected(suspects: pd.DataFrame, thumbnails: Thumbnails) -> dict[str, Any]:
    """The first suspects as far as there are pictures of them, how many there are, and how many are likely wrong."""
    shown = suspects.head(CARDS)
    likely = int((suspects["likely"] == "True").sum())
    return {"shown": _records(shown[shown["sha256"].isin(list(thumbnails))]), "likely": likely, "all": len(suspects)}


def near(pairs: pd.DataFrame, thumbnails: Thumbnails) -> dict[str, Any]:
    """The first pairs of near-duplicates as far as there are pictures of both, and how many there are."""
    shown = pairs.head(PAIRS)
    known = shown[["sha256", "other_sha256"]].isin(list(thumbnails)).all(axis=1)
    return {"shown": _records(shown[known]), "all": len(pairs)}


def _records(table: pd.DataFrame | None) -> list[dict[Hashable, Any]]:
    return [] if table is None else table.to_dict("records")


# The data, and how it is made again


def rejects(*tables: pd.DataFrame) -> dict[str, Any]:
    """How many files were left out for each reason, and the first of them."""
    table = pd.concat(tables).reindex(columns=["name", "reason", "detail"]).fillna("")
    counts = table["reason"].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    return {"counts": list(counts.items()), "first": _records(table.head(20)), "all": len(table)}


def flattened(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, text) of each value in nested sections and lists, by the path to it; urls without their secrets."""
    if isinstance(value, Mapping | list) and value:
        for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from flattened(inner, f"{key}.{name}" if key else str(name))
    else:
        words = {None: "null", True: "true", False: "false"}
        yield key, words[value] if value is None or isinstance(value, bool) else redacted(str(value))


def hashes(paths: list[Path]) -> list[tuple[str, str]]:
    """(path, SHA-256) of files."""
    return [(path.as_posix(), sha256_of(path)) for path in paths]


def sections(settings: Params) -> list[tuple[str, list[tuple[str, str]]]]:
    """The settings of each section of params.yaml."""
    return [(name, list(flattened(section))) for name, section in settings.model_dump().items()]
