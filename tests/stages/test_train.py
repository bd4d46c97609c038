import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch._inductor import config as inductor
from torch.nn import BatchNorm2d

import breedline.features
import breedline.probe
from breedline.errors import BreedlineError
from breedline.history import History
from breedline.zoo import create_model, features

Pipeline = Any
Width = Callable[[Path], int]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model/model.safetensors")


def _images(pipeline: Pipeline, split: str) -> int:
    return int((pd.read_csv(pipeline.path("labels.csv"))["split"] == split).sum())


def test_it_learns(trained: Path) -> None:
    metrics = json.loads((trained / "train.json").read_text())
    assert metrics["accuracy"] > 0.9
    assert metrics["epochs"] == 3
    assert metrics["base_lr"] == 0.004
    assert metrics["lr_find"] == {}


def test_the_metrics_say_what_else_the_result_depends_on(trained: Path) -> None:
    machine = json.loads((trained / "train.json").read_text())["machine"]
    assert machine.keys() == {"device", "cpu_capability", "threads", "precision", "torch", "fastai", "timm"}
    assert machine["threads"] == torch.get_num_threads()
    assert machine["precision"] == "fp32"
    assert machine["torch"] == torch.__version__
    assert machine["device"]


def test_the_model_says_what_is_needed_to_use_it(trained: Path) -> None:
    spec = json.loads((trained / "model/model.json").read_text())
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
    assert history["step"].tolist() == [1, 2, 3]


def test_equal_inputs_give_bit_equal_weights(pipeline: Pipeline, trained: Path, tmp_path: Path) -> None:
    again = pipeline.train(tmp_path)
    first, second = weights(trained), weights(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (trained / "train.json").read_bytes() == (again / "train.json").read_bytes()
    for name in ("show_batch.png", "loss.png", "datablock.txt", "live/metrics.json"):
        assert (trained / "report" / name).read_bytes() == (again / "report" / name).read_bytes(), name


def test_the_frozen_phase_teaches_the_head_and_the_normalisation_alone(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def keep(history: History) -> None:
        seen.append({name: tensor.clone() for name, tensor in history.learn.model.state_dict().items()})

    monkeypatch.setattr(History, "before_fit", keep, raising=False)
    pipeline.train(tmp_path, freeze_epochs=1, epochs=1)
    before, after = seen  # of the frozen phase
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    norms = [name for name, layer in create_model("test_resnet", 3).named_modules() if isinstance(layer, BatchNorm2d)]
    of_norms = {name for name in before if name.rpartition(".")[0] in norms}
    head = {name for name in before if name.startswith("fc.")}
    assert len(of_norms) > 10
    assert len(head) == 2
    assert changed <= of_norms | head
    assert {name for name in of_norms if name.endswith("running_mean")} | head <= changed


def test_the_finder_chooses_the_rate_and_shows_why(pipeline: Pipeline, tmp_path: Path, width: Width) -> None:
    folder = pipeline.train(tmp_path, base_lr="finder", epochs=1, batch_size=16)
    metrics = json.loads((folder / "train.json").read_text())
    assert metrics["lr_find"].keys() == {"valley", "steepest", "minimum_tenth"}
    assert metrics["base_lr"] == metrics["lr_find"]["valley"]
    assert width(folder / "report/lr_find.png") > 500


def test_one_vs_rest_loss_learns(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = pipeline.train(tmp_path, loss="bce", label_smoothing=0.1)
    assert json.loads((folder / "train.json").read_text())["accuracy"] > 0.9
    assert json.loads((folder / "model/model.json").read_text())["loss"] == "bce"


def test_a_precision_and_a_device_that_the_machine_lacks_are_replaced(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = pipeline.train(tmp_path, precision="fp16", keep_images="gpu")
    assert json.loads((folder / "train.json").read_text())["accuracy"] > 0.9


def test_where_the_images_are_kept_changes_no_number(
    pipeline: Pipeline, trained: Path, tmp_path: Path, assert_same: Callable[..., None]
) -> None:
    assert_same(trained, pipeline.train(tmp_path, keep_images="disk"), "report/show_batch.png")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_out_of_memory_gradients_are_accumulated_over_smaller_batches(
    pipeline: Pipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: str,
) -> None:
    steps, sizes = [], set()

    def too_much(history: History) -> None:
        if history.training:
            sizes.add(len(history.learn.yb[0]))
        if history.training and len(history.learn.yb[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(History, "after_pred", too_much, raising=False)
    monkeypatch.setattr(History, "after_step", lambda history: steps.append(history.epoch), raising=False)
    caplog.set_level("INFO")
    folder = pipeline.train(tmp_path, batch_size=16, precision=precision)
    assert not torch.is_autocast_enabled("cpu")
    assert [message for message in caplog.messages if "out of memory" in message] == [
        "train: out of memory: batches of 16 from now on in parts of 8",
        "train: out of memory: batches of 16 from now on in parts of 4",
    ]
    assert sizes == {16, 8, 4}
    assert len(steps) == 3 * (_images(pipeline, "train") // 16)
    assert json.loads((folder / "train.json").read_text())["accuracy"] > 0.9


def test_too_little_memory_for_two_images_is_one_line(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(history: History) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(History, "after_pred", too_much, raising=False)
    with pytest.raises(BreedlineError, match=r"memory of the CPU.* is too small for two images.*train.image_size"):
        pipeline.train(tmp_path)


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def state(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    """The pretrained weights."""
    return load_file(pipeline.path("weights") / "weights.safetensors")


def test_a_head_is_fitted_and_everything_fine_tuned(fine_tuned: Path) -> None:
    metrics = json.loads((fine_tuned / "train.json").read_text())
    assert metrics["accuracy"] > 0.9
    assert metrics["epochs"] == 2
    assert metrics["penalty"] in breedline.probe.PENALTIES
    assert metrics["share"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert metrics["head"].keys() == metrics["fine_tuned"].keys() == {"valid_loss", "accuracy"}
    assert metrics["valid_loss"] <= min(metrics[end]["valid_loss"] for end in ("head", "fine_tuned"))
    history = pd.read_csv(fine_tuned / "report/live/plots/metrics/valid_loss.tsv", sep="\t")
    assert history["step"].tolist() == [0, 1, 2], "0 is the head alone"
    assert history["valid_loss"].tolist()[0] == pytest.approx(metrics["head"]["valid_loss"])
    assert history["valid_loss"].tolist()[2] == pytest.approx(metrics["fine_tuned"]["valid_loss"], abs=1e-5)


def test_the_statistics_are_those_of_the_pretraining_and_all_else_is_fine_tuned(
    pretrained: Pipeline, fine_tuned: Path
) -> None:
    before, after = state(pretrained), weights(fine_tuned)
    assert json.loads((fine_tuned / "train.json").read_text())["share"] > 0
    same = {name for name in after if name in before and torch.equal(before[name], after[name])}
    assert same == {name for name in after if name.endswith(STATISTICS)}
    assert len(same) > 10


def test_statistics_that_are_not_frozen_are_trained_and_not_averaged(pretrained: Pipeline, tmp_path: Path) -> None:
    folder = pretrained.train(tmp_path, freeze_statistics=False, epochs=3)
    metrics = json.loads((folder / "train.json").read_text())
    before, after = state(pretrained), weights(folder)
    assert metrics["share"] in (0.0, 1.0)
    assert metrics["valid_loss"] == metrics["fine_tuned" if metrics["share"] else "head"]["valid_loss"]
    trained = {name for name in after if name.endswith("running_mean") and not torch.equal(before[name], after[name])}
    assert bool(trained) == (metrics["share"] == 1)


def test_no_epochs_publish_the_head_alone(pretrained: Pipeline, fine_tuned: Path, tmp_path: Path) -> None:
    folder = pretrained.train(tmp_path, epochs=0)
    metrics = json.loads((folder / "train.json").read_text())
    assert metrics["epochs"] == 0
    assert metrics["accuracy"] > 0.9
    head = json.loads((fine_tuned / "train.json").read_text())["head"]
    assert {name: metrics[name] for name in head} == head
    before, after = state(pretrained), weights(folder)
    assert all(torch.equal(after[name], before[name]) for name in after if not name.startswith("fc."))
    assert after["fc.weight"].shape[0] == 3


def test_without_pretrained_weights_fit_fits_nothing(
    pipeline: Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = pipeline.train(tmp_path, freeze_epochs="fit", epochs=1)
    assert "train: no body is pretrained, so there is no head to fit" in caplog.messages
    metrics = json.loads((folder / "train.json").read_text())
    assert not {"head", "fine_tuned", "share", "penalty"} & metrics.keys()
    assert metrics["epochs"] == 1
    means = [tensor for name, tensor in weights(folder).items() if name.endswith("running_mean")]
    assert means
    assert all(tensor.any() for tensor in means), "statistics are trained"


def test_settings_that_are_auto_depend_on_the_data(pretrained: Pipeline, pipeline: Pipeline, tmp_path: Path) -> None:
    settings = {"batch_size": "auto", "base_lr": "auto", "epochs": "auto", "freeze_epochs": 0}
    images = _images(pipeline, "train")
    metrics = json.loads((pretrained.train(tmp_path / "pretrained", **settings) / "train.json").read_text())
    assert (metrics["epochs"], metrics["batch_size"], metrics["base_lr"]) == (round(32 * 32 / images), 32, 0.002)
    settings["epochs"] = 1
    metrics = json.loads((pipeline.train(tmp_path / "scratch", **settings) / "train.json").read_text())
    assert (metrics["batch_size"], metrics["base_lr"]) == (32, 0.005)


def test_a_training_that_diverges_is_told_in_one_line(pretrained: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(
        BreedlineError, match=r"loss is no number any more after epoch 1: choose a smaller train\.base_lr"
    ):
        pretrained.train(tmp_path, base_lr=9e30)
    assert not (tmp_path / "model").exists()


def test_out_of_memory_features_are_computed_for_fewer_images_at_a_time(
    pretrained: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = []

    def too_much(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return features(model, images)

    monkeypatch.setattr(breedline.features, "features", too_much)
    folder = pretrained.train(tmp_path, batch_size=32, epochs=1)
    assert [message for message in caplog.messages if "out of memory" in message] == [
        "train: out of memory: batches of 32 from now on in parts of 16",
        "train: out of memory: batches of 32 from now on in parts of 8",
    ]
    assert sizes[:3] == [32, 16, 8]
    assert max(sizes[3:]) == 8
    assert json.loads((folder / "train.json").read_text())["accuracy"] > 0.9


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
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(pipeline: Pipeline, tmp_path: Path) -> None:
    losses = []
    # batches of one size in both phases, for each is compiled
    settings = {"freeze_epochs": 0, "epochs": 1, "base_lr": 0.001, "batch_size": _images(pipeline, "valid")}
    for mode in ("none", "default"):
        # else dropout draws other numbers; and without a pool of compilers, each of which imports torch
        with inductor.patch(fallback_random=True, compile_threads=1):
            folder = pipeline.train(tmp_path / mode, compile=mode, **settings)
        losses.append(json.loads((folder / "train.json").read_text())["valid_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_machine_that_cannot_compile_is_told_in_one_line(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    with (
        inductor.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(BreedlineError, match=r"train.compile: .*no-such-compiler.* or set it to none$"),
    ):
        pipeline.train(tmp_path, compile="default")


@pytest.mark.gpu
def test_cuda_graphs_compute_what_single_kernels_do(pipeline: Pipeline, tmp_path: Path) -> None:
    exact = {"precision": "fp32", "deterministic": True}
    folders = (pipeline.train(tmp_path / how, compile=how, **exact) for how in ("none", "auto"))
    kernels, graphs = (json.loads((folder / "train.json").read_text()) for folder in folders)
    assert graphs["valid_loss"] == pytest.approx(kernels["valid_loss"], abs=1e-4)
    assert graphs["train_loss"] == pytest.approx(kernels["train_loss"], abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"precision": "fp32", "deterministic": True},
        {"keep_images": "ram"},
        {"keep_images": "disk"},
        {"compile": "reduce-overhead"},
        {"compile": "none"},
    ],
    ids=str,
)
def test_a_gpu_learns(
    pipeline: Pipeline, tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = pipeline.train(tmp_path, **settings)
    assert json.loads((folder / "train.json").read_text())["accuracy"] > 0.9
    assert "of the GPU's memory" in caplog.text
