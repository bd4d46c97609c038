import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from fastai.torch_core import set_seed
from safetensors.torch import load_file

from breedline.errors import BreedlineError
from breedline.learner import Geometry, create_learner, create_model, data_block, load_items, loss_function
from stages.train import fine_tune

Pipeline = Any
Width = Callable[[Path], int]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "bundle/model.safetensors")


def test_it_learns(trained: Path) -> None:
    metrics = json.loads((trained / "train.json").read_text())
    assert metrics["accuracy"] > 0.9
    assert metrics["epochs"] == 3
    assert metrics["base_lr"] == 0.01
    assert metrics["lr_find"] == {}


def test_the_bundle_says_what_is_needed_to_use_it(trained: Path) -> None:
    spec = json.loads((trained / "bundle/model.json").read_text())
    assert spec["classes"] == ["blue", "green", "red"]
    assert spec["geometry"]["item_size"] == 40
    assert spec["geometry"]["size"] == 32
    assert spec["data"].keys() == {"labels", "presized", "weights"}
    assert str(trained) not in json.dumps(spec)


def test_the_report_shows_the_run(trained: Path, width: Width) -> None:
    report = trained / "report"
    for name in ("show_batch.png", "loss.png"):
        assert width(report / name) > 500
    text = (report / "datablock.txt").read_text()
    assert "Resize" in text
    assert "Normalize" in text
    history = pd.read_csv(report / "live/plots/metrics/accuracy.tsv", sep="\t")
    assert history["step"].tolist() == [0, 1, 2]


def test_equal_inputs_give_bit_equal_weights(pipeline: Pipeline, trained: Path, tmp_path: Path) -> None:
    again = pipeline.train(tmp_path)
    first, second = weights(trained), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (trained / "train.json").read_bytes() == (again / "train.json").read_bytes()
    for name in ("show_batch.png", "loss.png", "datablock.txt", "live/metrics.json"):
        assert (trained / "report" / name).read_bytes() == (again / "report" / name).read_bytes(), name


def test_the_phases_are_those_of_fine_tune(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pd.read_csv(pipeline.path("labels.csv"))
    items = load_items(pipeline.path("presized"), table[table["split"] != "test"])
    geometry = Geometry(40, 32, (0.5,) * 3, (0.25,) * 3)
    block = data_block(pipeline.path("presized"), ["blue", "green", "red"], geometry, pipeline.params.train.augment)

    def train(run: Any) -> dict[str, torch.Tensor]:
        set_seed(1, reproducible=True)
        dls = block.dataloaders(items, bs=16, num_workers=0, device=torch.device("cpu"))
        learn = create_learner(dls, create_model("resnet18", 3), "resnet18", loss_function("cross_entropy"))
        with learn.no_bar(), learn.no_logging():
            run(learn)
        return learn.model.state_dict()

    ours = train(lambda learn: fine_tune(learn, 1, 2, 0.004))
    fastai = train(lambda learn: learn.fine_tune(2, 0.004, freeze_epochs=1))
    assert all(torch.equal(ours[name], fastai[name]) for name in ours)


def test_the_finder_chooses_the_rate_and_shows_why(pipeline: Pipeline, tmp_path: Path, width: Width) -> None:
    folder = pipeline.train(tmp_path, base_lr="auto", epochs=1, batch_size=16)
    metrics = json.loads((folder / "train.json").read_text())
    assert metrics["lr_find"].keys() == {"valley", "steepest", "minimum_tenth"}
    assert metrics["base_lr"] == metrics["lr_find"]["valley"]
    assert width(folder / "report/lr_find.png") > 500


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "bce", "label_smoothing": 0.1},
        pytest.param({"precision": "bf16", "num_workers": 2}, marks=pytest.mark.slow),
    ],
)
def test_other_ways_to_train(pipeline: Pipeline, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = pipeline.train(tmp_path, **settings)
    assert json.loads((folder / "train.json").read_text())["accuracy"] > 0.9
    assert json.loads((folder / "bundle/model.json").read_text())["loss"] == settings.get("loss", "cross_entropy")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.assign(split=t["split"].replace("valid", "train")), "split valid has no images"),
        (
            lambda t: t.assign(split=t["split"].where(t["label"] != "red", "valid")),
            "no image of red is left to train on",
        ),
    ],
)
def test_splits_that_cannot_be_trained_on(pipeline: Pipeline, tmp_path: Path, change: Any, expected: str) -> None:
    labels = tmp_path / "labels.csv"
    change(pd.read_csv(pipeline.path("labels.csv"))).to_csv(labels, index=False)

    class Other(type(pipeline)):  # type: ignore[misc]
        def path(self, name: str) -> Path:
            return labels if name == "labels.csv" else super().path(name)

    with pytest.raises(BreedlineError, match=expected):
        Other(pipeline.folder, pipeline.params).train(tmp_path)
    assert not (tmp_path / "bundle").exists()
