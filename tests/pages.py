"""What a report is made of, as small as can be, and a browser to look at it in."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from breedline.metrics import by_confidence, gap, per_class
from breedline.params import Report
from breedline.shards import PRESIZED_COLUMNS, ShardSet, pack, write_index
from breedline.tables import write_csv, write_json
from stages.report import PAIR, SUSPECT, report

ROOT = Path(__file__).parents[1]
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync"
INPUTS = {
    "presized": "presized",
    "labels": "labels.csv",
    "rejected": "rejected.csv",
    "classes": "classes.csv",
    "labelled": "label.json",
    "trained": "train.json",
    "evaluated": "evaluate.json",
    "training": "train",
    "evaluation": "evaluate",
    "suspects": "suspects.csv",
    "near_duplicates": "near_duplicates.csv",
}
CONTRASTS = """
() => {
  const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const over = (colour, below) => { // what one sees of a colour on another one, red, green and blue
    context.fillStyle = `rgb(${below})`; context.fillRect(0, 0, 1, 1);
    context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = colour => colour.map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const behind = element => element
    ? over(getComputedStyle(element).backgroundColor, behind(element.parentElement)) : [255, 255, 255];
  return [...document.querySelectorAll("main *")].filter(one =>
    one.checkVisibility() && [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())).map(one => {
      const {color, fill} = getComputedStyle(one), below = behind(one);
      const [low, high] = [light(over(one.closest("svg") ? fill : color, below)), light(below)].sort((a, b) => a - b);
      return [(high + 0.05) / (low + 0.05), one.textContent.trim().slice(0, 40)];
    });
}
"""
"""A function of the page: of each text its contrast (WCAG 2.2) with what is behind it, and how it begins."""


def photo(number: int, side: int) -> bytes:
    """Soft shapes with some noise, as a photo has."""
    random = np.random.default_rng(number)
    shapes = Image.fromarray(random.integers(0, 255, (6, 6, 3), dtype="uint8")).resize((side, side), 3)
    noisy = np.asarray(shapes).astype(int) + random.integers(-12, 12, (side, side, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype("uint8")).save(buffer, "JPEG")
    return buffer.getvalue()


def presized_set(names: list[str], folder: Path, side: int = 40) -> ShardSet:
    """A picture for each name, which is also the content hash of the raw file that it is made of."""
    folder.mkdir(parents=True)
    photos = [photo(number, side) for number in range(len(names))]
    files = ((f"{number}.jpg", len(data), io.BytesIO(data)) for number, data in enumerate(photos))
    rows = [
        {**entry._asdict(), "name": name, "height": side, "width": side, "made": "kept", "origin": f"hash of {name}"}
        for entry, name in zip(pack(files, folder, "00"), names, strict=True)
    ]
    write_index(pd.DataFrame(rows, columns=PRESIZED_COLUMNS), folder)
    write_csv(pd.DataFrame(columns=["name", "sha256", "reason"]), folder / "rejected.csv")
    return ShardSet(folder, PRESIZED_COLUMNS)


def found(
    folder: Path, classes: list[str], images: int, *, side: int = 40, wrong: int = 4, suspects: int = 3, pairs: int = 2
) -> Path:
    """The files of INPUTS: `images` of the test split, of these classes in turn, the first `wrong` taken for the next one."""
    actual = np.arange(images) % len(classes)
    predicted = np.where(np.arange(images) < wrong, (actual + 1) % len(classes), actual)
    label = [classes[number] for number in actual]
    names = [f"{label} {number}" for number, label in enumerate(label)]
    hashes = [f"hash of {name}" for name in names]
    presized_set(names, folder / "presized", side)
    table = pd.DataFrame({"name": names, "label": label, "split": "test", "sha256": hashes, "size": 1})
    write_csv(table, folder / "labels.csv")
    write_csv(pd.DataFrame(columns=["name", "sha256", "reason", "detail"]), folder / "rejected.csv")
    write_csv(pd.DataFrame({"class": classes, "train": 7, "valid": 0, "test": 1}), folder / "classes.csv")
    confidence = np.random.default_rng(0).uniform(0.5, 1, images).round(6)
    loss = np.where(actual == predicted, -np.log(confidence), -np.log(1.01 - confidence)).round(6)
    (folder / "evaluate").mkdir()
    (folder / "train").mkdir()
    answers = {"name": names, "actual": label, "predicted": [classes[number] for number in predicted]}
    write_csv(pd.DataFrame({**answers, "probability": confidence, "loss": loss}), folder / "evaluate/predictions.csv")
    scores = per_class(classes, predicted, actual)
    write_csv(scores, folder / "evaluate/per_class.csv")
    numbers = {
        "accuracy": float((actual == predicted).mean()),
        "error_rate": float((actual != predicted).mean()),
        "top_3_accuracy": 1.0,
        "macro_f1": float(scores["f1"].mean()),
        "log_loss": float(loss.mean()),
        "calibration_error": gap(*by_confidence(confidence, actual == predicted)),
        "images": images,
        "log_loss_before": 0.7,
        "calibration_error_before": 0.1,
        "none_of_them": 0.0,
    }
    write_json({"test": numbers, "calibration": {"temperature": 1.1, "none_below": 0.61}}, folder / "evaluate.json")
    write_json({"valid_loss": 0.5, "accuracy": 0.9, "epochs": 0}, folder / "train.json")
    write_json({"images": images, "split": {"test": images}, "rejected": {"no_label": 0}}, folder / "label.json")
    doubtful = table.head(suspects).assign(
        suggested=classes[-1], label_probability=0.02, suggested_probability=0.9, likely=True
    )
    write_csv(doubtful[SUSPECT], folder / "suspects.csv")
    one, other = table.head(pairs), table.tail(pairs).add_prefix("other_").reset_index(drop=True)
    write_csv(pd.concat([one, other], axis=1)[PAIR].assign(similarity=0.98), folder / "near_duplicates.csv")
    return folder


def add_curves(folder: Path) -> None:
    """What train leaves of a training of two epochs that starts from a fitted head."""
    curves = folder / "train/live/plots/metrics"
    curves.mkdir(parents=True)
    for name, values in {"train_loss": {1: 0.5, 2: 0.4}, "valid_loss": {0: 0.6, 1: 0.55, 2: 0.5}}.items():
        rows = "".join(f"{step}\t{value}\n" for step, value in values.items())
        (curves / f"{name}.tsv").write_text(f"step\t{name}\n{rows}")
    (curves / "accuracy.tsv").write_text("step\taccuracy\n0\t0.91\n1\t0.93\n2\t0.95\n")
    scores = {"valid_loss": 0.5, "accuracy": 0.9}
    write_json({**scores, "epochs": 2, "head": scores, "fine_tuned": scores, "share": 0.75}, folder / "train.json")


def page_of(folder: Path, thumbnails: int = 200) -> str:
    """The report on what is in the folder; its file is index.html there."""
    inputs: dict[str, Any] = {name: folder / path for name, path in INPUTS.items()}
    report(Report(thumbnails=thumbnails), **inputs, settings=ROOT / "params.yaml", page=folder / "index.html")
    return (folder / "index.html").read_text("utf-8")


@contextlib.contextmanager
def opened(path: Path, **options: Any) -> Iterator[Page]:
    """The page in a browser without a network; nothing in it may fail, or ask for anything."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.fail("there is no Chromium, which `apt-get install chromium` brings: nobody knows what the page shows")
    expect.set_options(timeout=60_000)  # other tests compute at the same time
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=FLAGS.split()) as browser,
    ):
        context = browser.new_context(offline=True, **options)
        page = context.new_page()
        asked: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(path.absolute().as_uri())
        yield page
        assert wrong == []
        assert [url for url in asked if not url.startswith("data:")] == [path.absolute().as_uri()]
