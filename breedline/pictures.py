"""PNG pictures for people. Drawn without a display; the same input gives the same bytes.

Text is drawn as it is: a label such as `$x$` is no formula. Colours are those of Okabe and Ito, which people who
confuse red and green can tell apart, and sequential from light to dark.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from breedline.files import new_file

if TYPE_CHECKING:  # evaluate draws, too, and does without fastai
    from fastai.data.core import DataLoaders

Layout = Literal["constrained", "compressed"]
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
MAX_LABEL = 28
"""Characters of a label; in a longer one, the middle is left out."""
MAX_CLASSES = 100
"""Rows at most of a picture with a row per class."""
CLASSES_WITH_NUMBERS = 40
"""Up to so many classes, the cells of the confusion matrix have room for their numbers."""


@contextmanager
def _picture(path: Path, width: float, height: float, layout: Layout = "constrained") -> Iterator[Figure]:
    """A figure of (width, height) inches to draw on; saved when the block ends."""
    # read when a text is created, wherever that is: here or in fastai
    with mpl.rc_context({"text.parse_math": False, "text.usetex": False}):
        figure = Figure(figsize=(width, height), layout=layout)
        yield figure
        with new_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})


def short(label: str) -> str:
    """The label in at most MAX_LABEL printable characters."""
    text = "".join(character if character.isprintable() else " " for character in label)
    half = MAX_LABEL // 2
    return text if len(text) <= MAX_LABEL else f"{text[: half - 1]}…{text[-half:]}"


def batch_picture(dls: "DataLoaders", path: Path) -> None:
    """Nine images of a training batch as the model sees them, labels above."""
    with _picture(path, 8, 8.4) as figure:
        grid = _grid(figure, 3, 3)
        dls.show_batch(max_n=len(grid), ctxs=grid)
        for axes in grid:
            axes.set_title(short(axes.get_title()), fontsize=9)


def sheet_picture(rows: list[tuple[str, bytes]], path: Path, columns: int = 4) -> None:
    """Images (title, JPEG) on one sheet."""
    height = max(1, -(-len(rows) // columns))
    with _picture(path, columns * 2.6, height * 3.0) as figure:
        for axes, (title, data) in zip(_grid(figure, height, columns), rows, strict=False):
            axes.imshow(Image.open(io.BytesIO(data)).convert("RGB"))
            axes.set_title(title, fontsize=8)


def _grid(figure: Figure, rows: int, columns: int) -> list[Axes]:
    grid: list[Axes] = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
        axes.axis("off")
    return grid


def finder_picture(lrs: list[float], losses: list[float], rules: dict[str, float], path: Path) -> None:
    """The curve of the learning-rate finder, and the rate that each rule suggests."""
    with _picture(path, 7, 4) as figure:
        axes = figure.subplots()
        skip = max(1, len(lrs) // 10)
        axes.plot(lrs[skip:-5], losses[skip:-5], color="0.3")
        for (name, rate), colour in zip(rules.items(), (BLUE, VERMILION, GREEN), strict=True):
            axes.axvline(rate, color=colour, label=f"{name}: {rate:.2g}", linestyle="--")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))  # the default one writes a formula
        axes.legend()


def schedule_picture(schedule: list[list[float]], path: Path) -> None:
    """Learning rates and momentum of both phases, batch by batch: (first layer group, last layer group, momentum)."""
    first, last, momentum = zip(*schedule, strict=True)
    with _picture(path, 7, 4) as figure:
        axes, right = _two_scales(figure, 1, len(schedule))
        batches = range(1, len(schedule) + 1)
        dots = "." if len(schedule) < 50 else ""  # a line through one point is nothing
        axes.plot(batches, last, color=BLUE, marker=dots, label="learning rate of the head")
        axes.plot(batches, first, color=VERMILION, marker=dots, label="of the first layers")
        axes.set(xlabel="batch", ylabel="learning rate", ylim=(0, None))
        right.plot(batches, momentum, color=GREEN, marker=dots, linestyle="--", label="momentum (right)")
        right.set(ylabel="momentum", ylim=(0, 1))
        figure.legend(loc="outside upper center", ncols=3)


def loss_picture(epochs: dict[int, dict[str, float]], path: Path) -> None:
    """Loss on both splits and validation accuracy, by the number of the epoch; 0 is the fitted head, before the first."""
    with _picture(path, 7, 4) as figure:
        table = pd.DataFrame.from_dict(epochs, orient="index")
        axes, right = _two_scales(figure, table.index[0], table.index[-1])
        axes.plot(table["train_loss"], color=BLUE, marker=".", label="train loss")
        axes.plot(table["valid_loss"], color=VERMILION, marker=".", label="valid loss")
        axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
        right.plot(table["accuracy"], color=GREEN, marker=".", linestyle="--", label="accuracy (right)")
        right.set(ylabel="validation accuracy", ylim=(0, 1.02))
        figure.legend(loc="outside upper center", ncols=3)


def _two_scales(figure: Figure, first: int, last: int) -> tuple[Axes, Axes]:
    """Axes with one scale on the left and one on the right, over the whole numbers from `first` to `last`."""
    axes = figure.subplots()
    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return axes, axes.twinx()


def confusion_picture(counts: pd.DataFrame, title: str, path: Path) -> None:
    """How often each class (row, `actual`) was taken for each (column, `predicted`); coloured by the share of the row."""
    classes = len(counts)
    numbers = classes <= CLASSES_WITH_NUMBERS
    side = max(2, classes * (0.36 if numbers else 0.2))
    labels = [short(label) for label in counts.index]
    margin = 1.2 + 0.075 * max(map(len, labels))
    values = counts.to_numpy()
    shares = values / np.maximum(values.sum(axis=1, keepdims=True), 1)
    with _picture(path, side + margin + 1, side + margin, layout="compressed") as figure:  # for a fixed aspect ratio
        axes = figure.subplots()
        # the square root lifts what is rare, which is what one looks for
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
        figure.colorbar(image, label="share of the row", ticks=[0, 0.05, 0.2, 0.5, 1], shrink=min(1, 4 / side))
        ticks = range(classes)
        axes.set_xticks(ticks, labels, rotation=90, fontsize=8)
        axes.set_yticks(ticks, labels, fontsize=8)
        axes.set(xlabel="predicted", ylabel="actual", title=title)
        axes.set_xticks(np.arange(-0.5, classes), minor=True)
        axes.set_yticks(np.arange(-0.5, classes), minor=True)
        axes.grid(which="minor", color="0.9", linewidth=0.5)
        axes.tick_params(which="minor", length=0)
        for row, column in zip(*values.nonzero(), strict=True) if numbers else ():
            colour = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, str(values[row, column]), ha="center", va="center", fontsize=8, color=colour)


def f1_picture(table: pd.DataFrame, mean: float, title: str, path: Path) -> None:
    """A bar per class, in the order of the table (class, f1, images) from top to bottom, and the mean as a line."""
    labels = [f"{short(name)} ({images})" for name, images in zip(table["class"], table["images"], strict=True)]
    with _picture(path, 7.5, 1.2 + 0.2 * len(table)) as figure:
        axes = figure.subplots()
        rows = range(len(table))
        axes.barh(rows, table["f1"], color=BLUE, height=0.7)
        for row, value in zip(rows, table["f1"], strict=True):
            axes.text(1.02, row, f"{value:.2f}", va="center", fontsize=8)
        axes.axvline(mean, color=VERMILION, linestyle="--")
        axes.set_yticks(rows, labels, fontsize=8)
        axes.set(xlim=(0, 1.1), xticks=np.linspace(0, 1, 6), ylim=(len(table) - 0.4, -0.6), title=title)
        axes.set_xlabel(f"F1 (dashed: the mean, {mean:.3f}; in brackets: images of the class)")
