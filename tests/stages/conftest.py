"""A data set small enough to train on for real: three classes that differ in colour."""

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from breedline.checkpoints import remove_those_of
from breedline.files import sha256_of
from breedline.params import Params, Source, load_params
from breedline.pretrained import Pretrained, write_note
from stages.download import download
from stages.label import label
from stages.presize import presize
from stages.weights import weights

COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}
ARCH = "test_resnet"
"""timm's resnet for tests, of half a million weights: an epoch, a checkpoint and a compilation take a third of resnet18's time."""
IMAGES_PER_CLASS = 60
"""With half as many it depends on the seed, and so on the machine, whether three epochs are enough."""


@dataclass(frozen=True)
class Pipeline:
    """The folder of a pipeline that has run up to presize, and settings to train with."""

    folder: Path
    params: Params

    def path(self, name: str) -> Path:
        return self.folder / name

    def train(self, folder: Path, **settings: Any) -> Path:
        """Train into `folder` with some settings changed; `folder`, with model, train.json and report in it."""
        from stages.train import train

        train(
            self.params.train.model_copy(update=settings),
            self.path("presized"),
            self.path("labels.csv"),
            self.path("weights"),
            40,
            trained=folder / "model",
            metrics=folder / "train.json",
            report=folder / "report",
        )
        remove_those_of(folder / "model/model.safetensors")  # as evaluate does
        return folder


def _archive(path: Path) -> Path:
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for name, colour in COLOURS.items():
            for number in range(IMAGES_PER_CLASS):
                buffer = io.BytesIO()
                pixels = np.clip(random.normal(colour, 40, (40, 48, 3)), 0, 255).astype("uint8")
                Image.fromarray(pixels).save(buffer, "JPEG")
                info = tarfile.TarInfo(f"{name}_{number}.jpg")
                info.size = buffer.tell()
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return path


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """download, label and presize of the three colours."""
    folder = tmp_path_factory.mktemp("pipeline")
    params = load_params(Path(__file__).parents[2] / "params.yaml")
    sections: dict[str, Any] = {
        "download": params.download.model_copy(update={"sources": [Source(url=str(_archive(folder / "colours.tar")))]}),
        "weights": params.weights.model_copy(update={"source": "none"}),
        "label": params.label.model_copy(
            update={"pattern": r"(?P<label>\w+)_\d+\.jpg", "classes": 3, "min_per_class": 5}
        ),
        "presize": params.presize.model_copy(update={"shorter_side": 40}),
        "train": params.train.model_copy(
            update={
                "arch": ARCH,
                "image_size": 32,
                "epochs": 2,
                "freeze_epochs": 1,
                "batch_size": 8,
                "base_lr": 0.004,
                "lr_ratio": 100.0,
                "freeze_statistics": True,
                "precision": "fp32",
            }
        ),
    }
    params = params.model_copy(update=sections)
    (folder / "corrections.csv").write_text("name,sha256,action,label,reason\n")
    (folder / "duplicates.csv").write_text("sha256,leader\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BREEDLINE_CACHE", str(folder / "cache"))
        download(params.download, raw=folder / "raw")
        weights(params.weights, ARCH, weights=folder / "weights")
        label(
            params.label,
            folder / "raw",
            folder / "corrections.csv",
            folder / "duplicates.csv",
            labels=folder / "labels.csv",
            rejected=folder / "rejected.csv",
            classes=folder / "classes.csv",
            metrics=folder / "label.json",
        )
        presize(params.presize, folder / "raw", folder / "labels.csv", presized=folder / "presized")
    return Pipeline(folder, params)


@pytest.fixture(scope="session")
def trained(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model, its metrics and its report."""
    return pipeline.train(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def pretrained(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The same data with pretrained weights, and settings that fit a head to them before all is fine-tuned."""
    folder = tmp_path_factory.mktemp("pretrained")
    for path in pipeline.folder.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "weights").unlink()
    (folder / "weights").mkdir()
    torch.manual_seed(0)
    state = timm.create_model(ARCH).state_dict()
    for name, tensor in state.items():  # statistics as nothing but a pretraining leaves them
        if name.endswith("running_mean"):
            tensor.uniform_(-0.2, 0.2)
    save_file(state, folder / "weights/weights.safetensors")
    write_note(Pretrained(arch=ARCH, file="weights.safetensors", source="somewhere"), folder / "weights")
    settings = {"freeze_epochs": "fit", "base_lr": 0.002}
    train = pipeline.params.train.model_copy(update=settings)
    return Pipeline(folder, pipeline.params.model_copy(update={"train": train}))


@pytest.fixture(scope="session")
def fine_tuned(pretrained: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like `trained`, of a training from pretrained weights."""
    return pretrained.train(tmp_path_factory.mktemp("fine_tuned"))


@pytest.fixture(scope="session")
def assert_same() -> Callable[..., None]:
    """A function that compares two trained folders by hashes: of weights pytest would show the difference for minutes."""

    def compare(one: Path, other: Path, *more: str) -> None:
        for name in ("model/model.safetensors", "train.json", "report/loss.png", "report/live/metrics.json", *more):
            assert sha256_of(one / name) == sha256_of(other / name), name

    return compare


@pytest.fixture(scope="session")
def width() -> Callable[[Path], int]:
    """A function that opens a picture and gives its width in pixels."""

    def measure(path: Path) -> int:
        with Image.open(path) as picture:
            picture.load()
            return picture.width

    return measure
