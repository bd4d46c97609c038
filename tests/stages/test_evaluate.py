import dataclasses
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
from scipy.special import softmax

from breedline.errors import BreedlineError
from breedline.findings import calibrated
from breedline.items import load_items
from breedline.neighbours import FILE as NEIGHBOURS
from breedline.params import Augment
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from breedline.trained import TrainedSpec
from breedline.views import Geometry
from stages.evaluate import drawn, evaluate

Pipeline = Any
Width = Callable[[Path], int]
FILES = ("predictions.csv", "per_class.csv", "confused.csv", "confusion.png", "f1.png", "top_losses.png", NEIGHBOURS)


def run(pipeline: Pipeline, model: Path, folder: Path, labels: Path | None = None, **settings: Any) -> dict[str, Any]:
    evaluate(
        pipeline.params.evaluate.model_copy(update=settings),
        model,
        pipeline.path("presized"),
        labels or pipeline.path("labels.csv"),
        metrics=folder / "evaluate.json",
        report=folder / "report",
    )
    return json.loads((folder / "evaluate.json").read_text())


def test_the_numbers_follow_from_the_predictions(
    pipeline: Pipeline, trained: Path, tmp_path: Path, width: Width
) -> None:
    numbers = run(pipeline, trained / "model", tmp_path)
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
    numbers = run(pipeline, trained / "model", tmp_path)
    assert numbers.keys() == {"test", "valid", "calibration"}
    assert all(isinstance(value, int | float) for split in numbers.values() for value in split.values())
    assert not any(name in key for split in numbers.values() for key in split for name in ("red", "green", "blue"))


PLAIN = Augment(flip=False, max_rotate=0, max_zoom=1, max_warp=0, max_lighting=0, min_scale=1)
SPEC = TrainedSpec(
    arch="resnet18",
    classes=["a", "b", "c"],
    geometry=Geometry(40, 32, (0.5,) * 3, (0.5,) * 3),
    augment=PLAIN,
    pretrained=None,
    loss="cross_entropy",
    data={},
    code="",
)
UGLY = {"red": r"$\no formula{$", "green": "[bold]x[/] <b>", "blue": "a name too long to stand beside the others " * 3}


def test_labels_are_text_in_tables_and_pictures(pipeline: Pipeline, trained: Path, tmp_path: Path) -> None:
    model = shutil.copytree(trained / "model", tmp_path / "model")
    spec = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(spec | {"classes": [UGLY[name] for name in spec["classes"]]}))
    table = pd.read_csv(pipeline.path("labels.csv"))
    table.assign(label=table["label"].map(UGLY)).to_csv(tmp_path / "labels.csv", index=False)
    plain = run(pipeline, trained / "model", tmp_path / "plain")
    assert run(pipeline, model, tmp_path, tmp_path / "labels.csv") == plain
    assert set(pd.read_csv(tmp_path / "report/per_class.csv")["class"]) == set(UGLY.values())


@pytest.mark.parametrize("tta", [0, 2])
def test_equal_inputs_give_equal_bytes(pipeline: Pipeline, trained: Path, tmp_path: Path, tta: int) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        run(pipeline, trained / "model", folder, tta=tta)
    for name in ("evaluate.json", *(f"report/{file}" for file in FILES)):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_photos_to_show_are_drawn_from_training_by_their_content(pipeline: Pipeline) -> None:
    labels = pd.read_csv(pipeline.path("labels.csv"), dtype=str)
    items = load_items(ShardSet(pipeline.path("presized"), PRESIZED_COLUMNS), labels)
    few = drawn(items, 20)
    assert len(few) == 20
    assert drawn(items[::-1], 20) == few
    assert drawn([*items, *items], 1000) == drawn(items, 1000)
    assert len(drawn(items, 1000)) == len({item.sha256 for item in items})
    assert drawn(items, 50)[:20] == few
    assert len({item.label for item in few}) == 3
    again = [dataclasses.replace(item, name=f"copy of {item.name}") for item in items]
    assert drawn([*again, *items], 20) == drawn([*items, *again], 20)


def test_none_are_kept_where_none_are_to_be_shown(pipeline: Pipeline, trained: Path, tmp_path: Path) -> None:
    run(pipeline, trained / "model", tmp_path, neighbours=0)
    assert {file.name for file in (tmp_path / "report").iterdir()} == {*FILES} - {NEIGHBOURS}


def test_none_are_kept_where_the_head_is_not_one_linear_layer(
    pipeline: Pipeline, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.evaluate.has_linear_head", lambda model: False)
    run(pipeline, trained / "model", tmp_path)
    assert not (tmp_path / "report" / NEIGHBOURS).exists()


def test_views_are_weighed_as_fastai_does(pipeline: Pipeline) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 7, 3))
    valid = np.arange(7) < 3
    found = calibrated(pipeline.params.evaluate, SPEC, logits, np.zeros(7, int), valid, adjustable=False)
    plain, first, second = (softmax(view, axis=1) for view in logits)
    assert found.temperature == 1
    assert np.allclose(found.probabilities, 0.25 * plain + 0.75 * (first + second) / 2)
    assert np.array_equal(found.before, found.probabilities)


def test_the_calibration_is_that_of_the_validation_split(pipeline: Pipeline, trained: Path, tmp_path: Path) -> None:
    numbers = run(pipeline, trained / "model", tmp_path, none_error=0.2)
    images = numbers["valid"]["images"]
    assert numbers["valid"]["none_of_them"] <= 0.2
    assert 0 < numbers["calibration"]["none_below"] <= 1
    assert 0.05 < numbers["calibration"]["temperature"] < 20
    assert numbers["valid"]["log_loss"] <= numbers["valid"]["log_loss_before"] + 0.5 / images
    assert run(pipeline, trained / "model", tmp_path, none_error=0.0)["valid"]["none_of_them"] == 0


@pytest.mark.slow
def test_without_augmented_views_it_starts_without_fastai(pipeline: Pipeline, trained: Path, tmp_path: Path) -> None:
    YAML().dump(pipeline.params.model_dump(), tmp_path / "params.yaml")
    code = """
import sys
from pathlib import Path
from breedline.params import load_params
from stages.evaluate import evaluate
trained, presized, labels = map(Path, sys.argv[1:])
params = load_params(Path("params.yaml")).evaluate
evaluate(params, trained, presized, labels, metrics=Path("evaluate.json"), report=Path("report"))
print(*sys.modules)
"""
    command = [sys.executable, "-c", code, trained / "model", pipeline.path("presized"), pipeline.path("labels.csv")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    loaded = ran.stdout.split()
    assert "torch" in loaded
    assert "fastai" not in loaded
    assert (tmp_path / "report/predictions.csv").is_file()


def test_with_bce_probabilities_are_sigmoids(pipeline: Pipeline, tmp_path: Path) -> None:
    model = pipeline.train(tmp_path, loss="bce", epochs=1, freeze_epochs=0) / "model"
    assert run(pipeline, model, tmp_path, none_error=0.5)["test"]["none_of_them"] > 0


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
        run(pipeline, trained / "model", tmp_path, tmp_path / "labels.csv")


def test_a_bundle_is_all_it_needs(pipeline: Pipeline, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "model", tmp_path / "elsewhere")
    assert run(pipeline, tmp_path / "elsewhere", tmp_path)["test"]["images"] > 0


@pytest.mark.gpu
def test_a_gpu_predicts_what_a_cpu_does(
    pipeline: Pipeline, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = run(pipeline, trained / "model", tmp_path / "gpu")
    monkeypatch.setattr("stages.evaluate.pick_device", lambda: torch.device("cpu"))
    cpu = run(pipeline, trained / "model", tmp_path / "cpu")
    assert gpu["test"]["log_loss"] == pytest.approx(cpu["test"]["log_loss"], abs=0.01)
