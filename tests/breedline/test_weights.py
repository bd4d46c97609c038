"""The weights folder: what the params ask for, pinned, with a note of what it is."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from breedline.errors import BreedlineError
from breedline.params import Params, Weights, WeightsFile
from breedline.weights import fetch_weights

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
    assert ask(params, "none") == {"arch": "resnet18", "file": None, "source": None, "sha256": None}
    assert asked == []


@pytest.mark.parametrize("pinned", [True, False])
def test_weights_of_ones_own_are_copied(params: Weights, tmp_path: Path, pinned: bool) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    note = ask(params, WeightsFile(url=str(file), sha256=sha256 if pinned else None))
    assert note == {"arch": "resnet18", "file": "weights.safetensors", "source": str(file), "sha256": sha256}
    assert (FOLDER / "weights.safetensors").read_bytes() == b"weights"


def test_the_note_holds_no_secret_of_the_url(params: Weights, asked: list[Any]) -> None:
    note = ask(params, WeightsFile(url="https://user:s3cret@host/mine.pth?token=s3cret"))
    assert asked == [("https://user:s3cret@host/mine.pth?token=s3cret", None)]
    assert note["source"] == "https://host/mine.pth?…"


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


def test_weights_are_pinned_by_the_name_of_their_file(params: Weights, asked: list[Any]) -> None:
    assert ask(params, "imagenet", "resnet34.tv_in1k")["file"] == "weights.pth"
    assert asked == [("https://download.pytorch.org/models/resnet34-b627a593.pth", "b627a593")]


def test_a_plain_name_stands_for_a_tag_which_the_log_names(
    params: Weights, asked: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "breedline")
    note = ask(params, "imagenet", "resnet34")
    assert caplog.messages == ["weights: resnet34 stands for resnet34.a1_in1k"]
    ((url, sha256),) = asked
    assert url.endswith("/resnet34_a1_0-46f8f793.pth")
    assert sha256 == "46f8f793"
    named = {"arch": "resnet34", "source": "resnet34.a1_in1k"}
    assert note == {**named, "file": "weights.pth", "sha256": note["sha256"]}
    caplog.clear()
    ask(params, "imagenet", "resnet34.a1_in1k")
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("arch", "repository"),
    [
        ("convnext_tiny.in12k_ft_in1k", "timm/convnext_tiny.in12k_ft_in1k"),
        ("convnext_tiny", "timm/convnext_tiny.in12k_ft_in1k"),
        ("vit_base_patch16_clip_quickgelu_224.openai", "timm/vit_base_patch16_clip_224.openai"),
    ],
)
def test_what_no_name_pins_is_on_the_hub(params: Weights, asked: list[Any], arch: str, repository: str) -> None:
    note = ask(params, "imagenet", arch)
    assert asked == [(f"https://huggingface.co/{repository}/resolve/main/model.safetensors", None)]
    assert (note["file"], note["arch"]) == ("weights.safetensors", arch)


def test_an_architecture_without_weights_is_told(params: Weights, asked: list[Any]) -> None:
    with pytest.raises(
        BreedlineError, match=r"no pretrained weights of vit_base_patch16_gap_224: set weights\.source to"
    ):
        ask(params, "imagenet", "vit_base_patch16_gap_224")
    assert asked == []


def test_numpy_weights_are_refused_unfetched(params: Weights, asked: list[Any]) -> None:
    with pytest.raises(
        BreedlineError, match=r"host/mine\.npz\?… holds no state dict: .* a \.safetensors or \.pth file"
    ):
        ask(params, WeightsFile(url="https://host/mine.npz?token=s3cret"))
    assert asked == []


@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k"])
def test_weights_of_a_package_need_no_network(params: Weights, asked: list[Any], arch: str) -> None:
    note = ask(params, "imagenet", arch)
    ((path, sha256),) = asked
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == sha256
    assert (note["file"], note["source"]) == ("weights.pth", "tf_efficientnet_lite0.in1k")


@pytest.mark.parametrize("arch", ["tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k"])
def test_without_the_package_the_weights_come_from_elsewhere(
    params: Weights, asked: list[Any], monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    monkeypatch.setattr("breedline.architectures.find_spec", lambda module: None)
    assert ask(params, "imagenet", arch)["source"] == "tf_efficientnet_lite0.in1k"
    ((url, _),) = asked
    assert url.endswith("/tf_efficientnet_lite0-0aa007d2.pth")
