"""What people would rather look at than read. Figures are drawn without a screen and are the same bytes each time."""

import io
from pathlib import Path

import numpy as np
from fastai.data.core import DataLoaders
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from breedline.files import new_file


def _save(figure: Figure, path: Path) -> None:
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, metadata={"Software": None})
    plt.close(figure)


def batch_picture(dls: DataLoaders, path: Path) -> None:
    """A training batch as the model sees it, labels above."""
    dls.show_batch(max_n=9, figsize=(8, 8))
    _save(plt.gcf(), path)


def finder_picture(lrs: list[float], losses: list[float], rules: dict[str, float], path: Path) -> None:
    """The learning-rate finder's curve, with what each rule suggests."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    skip = max(1, len(lrs) // 10)
    axes.plot(lrs[skip:-5], losses[skip:-5], color="0.3")
    for number, (name, rate) in enumerate(rules.items()):
        axes.axvline(rate, color=f"C{number}", label=f"{name}: {rate:.2g}", linestyle="--")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.legend()
    _save(figure, path)


def schedule_picture(schedule: list[list[float]], path: Path) -> None:
    """The learning rates and the momentum of both phases, step by step: (first group, last group, momentum)."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    first, last, momentum = zip(*schedule, strict=True)
    axes.plot(last, label="learning rate of the head")
    axes.plot(first, label="of the first layers")
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    right = axes.twinx()
    right.plot(momentum, color="C2", label="momentum (right)")
    right.set(ylabel="momentum", ylim=(0, 1))
    figure.legend(loc="outside upper center", ncols=3)
    _save(figure, path)


def loss_picture(history: list[dict[str, float]], path: Path) -> None:
    """Loss of both splits and accuracy, epoch by epoch."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    epochs = np.arange(1, len(history) + 1)
    for name in ("train_loss", "valid_loss"):
        axes.plot(epochs, [epoch[name] for epoch in history], marker=".", label=name.replace("_", " "))
    axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    right = axes.twinx()
    right.plot(epochs, [epoch["accuracy"] for epoch in history], color="C2", marker=".", label="accuracy (right)")
    right.set(ylabel="validation accuracy", ylim=(0, 1.02))
    figure.legend(loc="outside upper center", ncols=3)
    _save(figure, path)


def sheet_picture(rows: list[tuple[str, bytes]], path: Path, columns: int = 4) -> None:
    """Pictures (title, JPEG) on one sheet."""
    height = max(1, -(-len(rows) // columns))
    figure = Figure(figsize=(columns * 2.6, height * 3.0), layout="constrained")
    for axes in figure.subplots(height, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (title, data) in zip(figure.axes, rows, strict=False):
        axes.imshow(Image.open(io.BytesIO(data)).convert("RGB"))
        axes.set_title(title, fontsize=8)
    _save(figure, path)
