import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from onnx import helper
from PIL import Image
from ruamel.yaml import YAML
from torch import nn

import stages.bundle
from breedline.app import Look, Observer
from breedline.bundle import FILES, SPEC, WEIGHTS, read_bundle
from breedline.card import model_card
from breedline.classifier import Classifier, Photo, Prediction
from breedline.errors import BreedlineError
from breedline.export import onnx_graph
from breedline.items import load_items
from breedline.neighbours import FILE, read
from breedline.preprocessing import view_of_presized
from breedline.shards import PRESIZED_COLUMNS, ShardSet
from breedline.trained import load_trained
from breedline.views import normalised
from breedline.zoo import create_model, features
from stages.bundle import answers, bundle
from stages.evaluate import drawn, evaluate

Pipeline = Any
WITHOUT_US = Path(__file__).parents[2] / "examples/without_breedline.py"


def run(pipeline: Pipeline, trained: Path, folder: Path) -> Path:
    """Evaluate and bundle what was trained; the bundle."""
    data = (trained / "model", pipeline.path("presized"), pipeline.path("labels.csv"))
    outputs = (folder / "evaluate.json", folder / "report")
    evaluate(pipeline.params.evaluate, *data, metrics=outputs[0], report=outputs[1])
    bundle(pipeline.params.bundle, *data, *outputs, 40, 92, models=folder / "models")
    return folder / "models"


@pytest.fixture(scope="module")
def models(pipeline: Pipeline, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(pipeline, trained, tmp_path_factory.mktemp("bundled"))


@pytest.fixture
def tested(pipeline: Pipeline, tmp_path: Path) -> list[Path]:
    """The presized images of the test split, as files, in the order of predictions.csv."""
    images = ShardSet(pipeline.path("presized"), PRESIZED_COLUMNS)
    items = [
        item for item in load_items(images, pd.read_csv(pipeline.path("labels.csv"), dtype=str)) if item.split == "test"
    ]
    paths = [tmp_path / f"{number:03d}.jpg" for number in range(len(items))]
    for path, item in zip(paths, items, strict=True):
        path.write_bytes(images.read(item.shard, item.offset, item.size))
    return paths


@pytest.mark.slow
def test_timm_transformers_and_onnxruntime_say_what_evaluate_says(models: Path, tested: list[Path]) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-W", "ignore", WITHOUT_US, str(models), *map(str, tested)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=models.parent)
    assert ran.returncode == 0, ran.stderr
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    expected = pd.read_csv(models.parent / "report/predictions.csv")
    for library in ("timm", "onnxruntime", "transformers"):
        assert [max(said[library], key=said[library].get) for said in answers] == expected["predicted"].tolist()
        probabilities = np.array([max(said[library].values()) for said in answers])
        assert np.abs(probabilities - expected["probability"]).max() < 1e-4


def test_the_example_needs_nothing_of_ours() -> None:
    assert not re.search(r"^\s*(from|import) (breedline|stages|flows)", WITHOUT_US.read_text(), re.MULTILINE)


def test_the_classifier_says_what_evaluate_says(models: Path, tested: list[Path]) -> None:
    expected = pd.read_csv(models.parent / "report/predictions.csv")
    found = Classifier.load(models).predict(tested, top=1, min_confidence=0.0)
    assert all(isinstance(prediction, Prediction) for prediction in found)
    assert [prediction.label for prediction in found] == expected["predicted"].tolist()
    best = [probability for prediction in found for _, probability in prediction.top]
    assert np.abs(np.array(best) - expected["probability"]).max() < 1e-4


def test_the_spec_has_the_calibration_and_the_preprocessing(models: Path) -> None:
    spec = read_bundle(models)
    calibration = json.loads((models.parent / "evaluate.json").read_text())["calibration"]
    assert calibration == {"temperature": spec.temperature, "none_below": spec.none_below}
    assert (spec.preprocessing.shorter_side, spec.preprocessing.input_size, spec.preprocessing.quality) == (40, 32, 92)
    assert spec.classes == ["blue", "green", "red"]
    assert {"torch", "timm"} <= spec.versions.keys()


def test_the_card_says_how_good_it_is(models: Path) -> None:
    card = (models / "README.md").read_text()
    numbers = json.loads((models.parent / "evaluate.json").read_text())["test"]
    assert card.startswith("---\n")
    for text in (
        "library_name: timm",
        "pipeline_tag: image-classification",
        f"| {numbers['accuracy']:.4f} |",
        "Wilson",
    ):
        assert text in card
    assert str(models.parent) not in card


@pytest.mark.parametrize(
    ("pretrained", "said", "base"),
    [
        (None, "Training began with random weights.", None),
        (
            "tf_efficientnet_lite0.in1k",
            "Training began with timm's weights tf_efficientnet_lite0.in1k (licence: apache-2.0).",
            "timm/tf_efficientnet_lite0.in1k",
        ),
        ("https://host/a.pth?…", "the weights of https://host/a.pth?…, whose licence is to be asked there.", None),
    ],
)
def test_the_card_says_whose_weights_training_began_with(
    models: Path, pretrained: str | None, said: str, base: str | None
) -> None:
    numbers = json.loads((models.parent / "evaluate.json").read_text())
    scores, labels = pd.DataFrame({"images": [0]}), pd.DataFrame({"split": ["test"]})
    card = model_card(read_bundle(models), numbers, scores, labels, "other", pretrained)
    assert said in card
    front = YAML(typ="safe").load(card.split("---")[1])
    assert (front["license"], front.get("base_model")) == ("other", base)


def test_equal_inputs_give_equal_bytes(pipeline: Pipeline, trained: Path, models: Path, tmp_path: Path) -> None:
    again = run(pipeline, trained, tmp_path)
    for name in (*FILES, SPEC):
        assert (again / name).read_bytes() == (models / name).read_bytes(), name
    assert b".py" not in (models / "model.onnx").read_bytes()  # no source file of this machine


def test_a_graph_that_answers_otherwise_is_not_published(
    pipeline: Pipeline, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, spec = load_trained(trained / "model")
    other = onnx_graph(create_model(spec.arch, len(spec.classes)), spec.geometry.size)
    monkeypatch.setattr(stages.bundle, "onnx_graph", lambda model, size: other)
    with pytest.raises(BreedlineError, match="the ONNX graph gives other answers than the model"):
        run(pipeline, trained, tmp_path)
    assert not (tmp_path / "models").exists()


def test_a_graph_with_other_features_is_not_published(
    pipeline: Pipeline, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features times -1, and a head times -1, give the same logits."""

    def turned(model: nn.Module, size: int) -> bytes:
        graph = onnx.load_model_from_string(onnx_graph(model, size))
        (last,) = (node for node in graph.graph.node if "logits" in node.output)
        graph.graph.node.append(helper.make_node("Neg", ["features"], ["turned"]))
        graph.graph.output[1].name = "turned"
        assert "features" in last.input
        return graph.SerializeToString()

    monkeypatch.setattr(stages.bundle, "onnx_graph", turned)
    with pytest.raises(
        BreedlineError, match=r"other answers than the model \(0 of \d+ images; logits differ by .* and features"
    ):
        run(pipeline, trained, tmp_path)


def test_the_graph_gives_what_the_head_sees(
    pipeline: Pipeline, models: Path, trained: Path, tested: list[Path]
) -> None:
    model, spec = load_trained(trained / "model")
    squares = np.stack([view_of_presized(path.read_bytes(), spec.geometry.size) for path in tested])
    with torch.inference_mode():
        expected = features(model, normalised(torch.from_numpy(squares), spec.geometry)).numpy()
    classifier = Classifier.load(models)
    assert classifier.n_features == model.num_features == expected.shape[1]
    assert np.abs(classifier._features(squares) - expected).max() < 1e-4


def test_photos_of_evaluate_fit_the_bundle_and_each_is_its_own_nearest(pipeline: Pipeline, models: Path) -> None:
    observer = Observer.load(models)
    found = read(models.parent / "report" / FILE, observer.spec.files[WEIGHTS], observer.n_features)
    images = ShardSet(pipeline.path("presized"), PRESIZED_COLUMNS)
    labels = pd.read_csv(pipeline.path("labels.csv"), dtype=str)
    training = {item.name: item for item in load_items(images, labels) if item.split == "train"}
    assert found.names == [item.name for item in drawn(list(training.values()), 500)]
    assert found.labels == [training[name].label for name in found.names]
    observer.neighbours = found
    for name in found.names[:10]:
        item = training[name]
        seen = observer.look(Photo(name, images.read(item.shard, item.offset, item.size)))
        assert isinstance(seen, Look)
        first, second, *_ = seen.nearest
        assert first.name == name
        assert first.similarity > 0.999
        assert np.abs(first.thumbnail.astype(int) - seen.view).mean() < 12
        assert second.similarity <= first.similarity


def test_the_bundle_has_no_photos(models: Path) -> None:
    assert {path.name for path in models.iterdir()} == {SPEC, *FILES}


def test_without_one_linear_head_the_graph_gives_logits_alone() -> None:
    model = create_model("resnetv2_18", 3)
    graph = onnx.load_model_from_string(onnx_graph(model, 64))
    assert [output.name for output in graph.graph.output] == ["logits"]
    with torch.inference_mode():
        assert [output.shape for output in answers(model, torch.zeros(2, 3, 64, 64))] == [(2, 3)]


def test_a_photo_of_any_size_is_seen_as_the_pipeline_sees_it(models: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (300, 411, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (models.parent / "photo.png").write_bytes(buffer.getvalue())
    from_file, from_memory = Classifier.load(models).predict([models.parent / "photo.png", Image.fromarray(pixels)])
    assert from_file.top == from_memory.top
