import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML

from breedline.augment import Transforms
from breedline.bundle import load_bundle
from breedline.errors import BreedlineError
from breedline.inference import in_batches
from breedline.items import load_items
from breedline.pixels import Pixels, Store
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from breedline.views import Geometry
from stages.evaluate import evaluate, predict

Pipeline = Any
Width = Callable[[Path], int]
FILES = ("predictions.csv", "per_class.csv", "confused.csv", "confusion.png", "f1.png", "top_losses.png")


def run(pipeline: Pipeline, bundle: Path, folder: Path, labels: Path | None = None, **settings: Any) -> dict[str, Any]:
    evaluate(
        pipeline.params.evaluate.model_copy(update=settings),
        bundle,
        pipeline.path("presized"),
        labels or pipeline.path("labels.csv"),
        metrics=folder / "evaluate.json",
        report=folder / "report",
    )
    return json.loads((folder / "evaluate.json").read_text())


def test_the_numbers_follow_from_the_predictions(
    pipeline: Pipeline, trained: Path, tmp_path: Path, width: Width
) -> None:
    numbers = run(pipeline, trained / "bundle", tmp_path)
    table = pd.read_csv(tmp_path / "report/predictions.csv")
    labels = pd.read_csv(pipeline.path("labels.csv"))
    assert table["name"].tolist() == labels.loc[labels["split"] == "test", "name"].tolist()
    right = table["actual"] == table["predicted"]
    assert numbers["test"]["images"] == len(table)
    assert numbers["test"]["accuracy"] == round(right.mean(), 6)
    assert numbers["test"]["log_loss"] == pytest.approx(table["loss"].mean(), abs=1e-4)
    assert numbers["valid"]["accuracy"] == json.loads((trained / "train.json").read_text())["accuracy"]
    assert pd.read_csv(tmp_path / "report/per_class.csv")["images"].sum() == len(table)
    assert pd.read_csv(tmp_path / "report/confused.csv")["times"].sum() == (~right).sum()
    for name in ("top_losses.png", "confusion.png", "f1.png"):
        assert width(tmp_path / "report" / name) > 300


def test_numbers_of_a_single_class_are_no_metrics(pipeline: Pipeline, trained: Path, tmp_path: Path) -> None:
    numbers = run(pipeline, trained / "bundle", tmp_path)
    assert numbers.keys() == {"test", "valid"}
    assert all(isinstance(value, int | float) for split in numbers.values() for value in split.values())
    assert not any(name in key for split in numbers.values() for key in split for name in ("red", "green", "blue"))


UGLY = {"red": r"$\no formula{$", "green": "[bold]x[/] <b>", "blue": "a name too long to stand beside the others " * 3}


def test_labels_are_text_in_tables_and_pictures(pipeline: Pipeline, trained: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(trained / "bundle", tmp_path / "bundle")
    spec = json.loads((bundle / "model.json").read_text())
    (bundle / "model.json").write_text(json.dumps(spec | {"classes": [UGLY[name] for name in spec["classes"]]}))
    table = pd.read_csv(pipeline.path("labels.csv"))
    table.assign(label=table["label"].map(UGLY)).to_csv(tmp_path / "labels.csv", index=False)
    plain = run(pipeline, trained / "bundle", tmp_path / "plain")
    assert run(pipeline, bundle, tmp_path, tmp_path / "labels.csv") == plain
    assert set(pd.read_csv(tmp_path / "report/per_class.csv")["class"]) == set(UGLY.values())


@pytest.mark.parametrize("tta", [0, 2])
def test_equal_inputs_give_equal_bytes(pipeline: Pipeline, trained: Path, tmp_path: Path, tta: int) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        run(pipeline, trained / "bundle", folder, tta=tta)
    for name in ("evaluate.json", *(f"report/{file}" for file in FILES)):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_views_are_weighed_as_fastai_does(pipeline: Pipeline, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shades = iter([0.4, 0.8] * 9)

    def central(pixels: Pixels, geometry: Geometry, device: torch.device) -> torch.Tensor:
        return torch.zeros(len(pixels.start), 3, geometry.size, geometry.size)

    def random(transforms: Transforms, pixels: Pixels, device: torch.device, split_idx: int) -> torch.Tensor:
        assert split_idx == 0
        return central(pixels, transforms.geometry, device) + next(shades)

    monkeypatch.setattr("stages.evaluate.central_views", central)
    monkeypatch.setattr(Transforms, "finished", random)
    model, spec = load_bundle(trained / "bundle")
    images = ShardSet(pipeline.path("presized"), PRESIZED_COLUMNS)
    items = load_items(images, pd.read_csv(pipeline.path("labels.csv")))[:7]
    params = pipeline.params.evaluate.model_copy(update={"tta": 2})
    store = Store(images, torch.device("cpu"), spec.geometry.max_side)
    found = predict(params, model, spec, store.batches(in_batches(items, 3)), store.device)
    with torch.inference_mode():
        plain, first, second = (model(torch.full((1, 3, 32, 32), value)).softmax(1) for value in (0.0, 0.4, 0.8))
    wanted = 0.25 * plain + 0.75 * (first + second) / 2
    assert np.allclose(found, wanted.expand(7, 3), atol=1e-5)


@pytest.mark.slow
def test_without_augmented_views_it_starts_without_fastai(pipeline: Pipeline, trained: Path, tmp_path: Path) -> None:
    YAML().dump(pipeline.params.model_dump(), tmp_path / "params.yaml")
    code = """
import sys
from pathlib import Path
from breedline.params import load_params
from stages.evaluate import evaluate
bundle, presized, labels = map(Path, sys.argv[1:])
params = load_params(Path("params.yaml")).evaluate
evaluate(params, bundle, presized, labels, metrics=Path("evaluate.json"), report=Path("report"))
print(*sys.modules)
"""
    command = [sys.executable, "-c", code, trained / "bundle", pipeline.path("presized"), pipeline.path("labels.csv")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    loaded = ran.stdout.split()
    assert "torch" in loaded
    assert "fastai" not in loaded
    assert (tmp_path / "report/predictions.csv").is_file()


def test_with_bce_an_image_may_be_none_of_them(pipeline: Pipeline, tmp_path: Path) -> None:
    bundle = pipeline.train(tmp_path, loss="bce", epochs=1, freeze_epochs=0) / "bundle"
    assert run(pipeline, bundle, tmp_path, none_below=0.0)["test"]["none_of_them"] == 0
    assert run(pipeline, bundle, tmp_path, none_below=0.9999)["test"]["none_of_them"] == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.assign(split=t["split"].replace("test", "train")), "split test has no images"),
        (lambda t: t.assign(label=t["label"].replace("red", "pink")), "does not know the class pink"),
    ],
)
def test_what_cannot_be_evaluated(
    pipeline: Pipeline, trained: Path, tmp_path: Path, change: Any, expected: str
) -> None:
    change(pd.read_csv(pipeline.path("labels.csv"))).to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(BreedlineError, match=expected):
        run(pipeline, trained / "bundle", tmp_path, tmp_path / "labels.csv")


def test_a_bundle_is_all_it_needs(pipeline: Pipeline, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "bundle", tmp_path / "elsewhere")
    assert run(pipeline, tmp_path / "elsewhere", tmp_path)["test"]["images"] > 0


@pytest.mark.gpu
def test_a_gpu_predicts_what_a_cpu_does(
    pipeline: Pipeline, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = run(pipeline, trained / "bundle", tmp_path / "gpu")
    monkeypatch.setattr("stages.evaluate.pick_device", lambda: torch.device("cpu"))
    cpu = run(pipeline, trained / "bundle", tmp_path / "cpu")
    assert gpu["test"]["log_loss"] == pytest.approx(cpu["test"]["log_loss"], abs=0.01)
