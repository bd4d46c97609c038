"""Models of timm: a linear head on pooled features, layer groups, and pretrained weights, read without a network."""

import json
import pickle
import re
import socket
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model

from breedline.architectures import Known, architectures
from breedline.errors import BreedlineError
from breedline.zoo import (
    create_model,
    features,
    known_architectures,
    layer_groups,
    linear_head,
    load_pretrained,
    statistics,
)

ARCHS = {
    "test_resnet": 64,
    "test_vit": 160,
    "test_efficientnet": 64,
    "resnet18": 64,
    "tf_efficientnet_lite0": 64,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 224,
    "densenet121": 64,
    "mobilenetv3_small_050": 64,
    "regnetx_002": 64,
}
"""Architectures, and the side in pixels of images for them."""
Files = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", connect)


def folder(file: str | None) -> Path:
    """A folder with the note of such a file."""
    path = Path("weights")
    path.mkdir(exist_ok=True)
    (path / "weights.json").write_text(json.dumps({"arch": "test_resnet", "file": file, "source": f"file:{file}"}))
    return path


def saved(state: object, file: str = "weights.pth") -> Path:
    path = folder(file) / file
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)  # type: ignore[arg-type]
    return path.parent


def trained(arch: str, n_classes: int) -> Files:
    """A state dict of which no tensor is as at creation."""
    state = timm.create_model(arch, num_classes=n_classes).state_dict()
    return {name: torch.rand_like(value) if value.is_floating_point() else value + 7 for name, value in state.items()}


def body(state: Files) -> Files:
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def test_known_architectures_are_rows_of_the_table() -> None:
    known = known_architectures()
    assert Known("resnet34", "resnet34.a1_in1k", "") in known
    assert {row.name for row in known} == architectures()


@pytest.mark.parametrize("arch", ARCHS)
def test_the_head_turns_features_into_what_the_model_says(arch: str) -> None:
    model, images = create_model(arch, 5).eval(), torch.randn(2, 3, ARCHS[arch], ARCHS[arch])
    with torch.inference_mode():
        assert torch.allclose(linear_head(model)(features(model, images)), model(images), atol=1e-5)
    assert linear_head(model).out_features == 5


@pytest.mark.parametrize(
    "arch", [*ARCHS, "deit_tiny_distilled_patch16_224", "resnetv2_18", "volo_d1_224", "pit_ti_224"]
)
def test_layer_groups_go_from_the_stem_to_the_head(arch: str) -> None:
    model = create_model(arch, 5)
    groups = layer_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group]
    assert sorted(grouped) == sorted(names.values())
    assert len(groups) > 1
    assert all(groups)
    assert {len(parameter) for parameter in groups[-1]} == {5}
    assert grouped[0] == next(iter(names.values()))
    again = layer_groups(model)
    assert [[id(p) for p in group] for group in again] == [[id(p) for p in group] for group in groups]


def test_layers_of_a_resnet_are_grouped_block_by_block() -> None:
    model = create_model("resnet18", 5)
    stem, first, *_, last, head = layer_groups(model)
    assert {id(p) for p in stem} == {id(p) for layer in (model.conv1, model.bn1) for p in layer.parameters()}
    assert [id(p) for p in first] == [id(p) for p in model.layer1[0].parameters()]
    assert [id(p) for p in last] == [id(p) for p in model.layer4[1].parameters()]
    assert [id(p) for p in head] == [id(p) for p in model.fc.parameters()]


@pytest.mark.parametrize("arch", ["deit_tiny_distilled_patch16_224", "resnetv2_18", "volo_d1_224"])
def test_a_head_that_is_not_one_linear_layer_is_told(arch: str) -> None:
    with pytest.raises(BreedlineError, match=r"is not one linear layer: set train\.freeze_epochs to a number"):
        linear_head(create_model(arch, 5))


def test_an_encoder_that_cannot_classify_is_told() -> None:
    with (
        torch.device("meta"),
        pytest.raises(BreedlineError, match=r"qwen3_vit_88m_enc has no head .* another train\.arch"),
    ):
        create_model("qwen3_vit_88m_enc", 5)


@pytest.mark.parametrize("file", ["weights.pth", "weights.safetensors"])
def test_a_head_of_another_number_of_classes_stays_random(file: str) -> None:
    state = trained("test_resnet", 1000)
    path = saved(state, file)
    torch.manual_seed(0)
    model = load_pretrained("test_resnet", 3, path)
    assert model
    loaded = model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in body(state).items())
    head = linear_head(model).weight
    assert head.shape[0] == 3
    assert not torch.isin(head, state["fc.weight"]).any()


@pytest.mark.parametrize("n_classes", [1000, 3])
def test_a_head_of_the_same_number_of_classes_is_taken(n_classes: int) -> None:
    state = trained("test_resnet", n_classes)
    model = load_pretrained("test_resnet", n_classes, saved(state))
    assert model
    assert torch.equal(linear_head(model).weight, state["fc.weight"])


@pytest.mark.parametrize("wrap", ["model", "state_dict"])
def test_a_checkpoint_around_the_weights_is_unwrapped(wrap: str) -> None:
    state = trained("test_resnet", 7)
    model = load_pretrained("test_resnet", 3, saved({wrap: state, "epoch": 3}))
    assert model
    assert torch.equal(model.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


def test_a_body_without_a_head_is_taken() -> None:
    state = body(trained("test_resnet", 3))
    model = load_pretrained("test_resnet", 3, saved(state))
    assert model
    assert torch.equal(model.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


@pytest.mark.parametrize("arch", ["resnet18.tv_in1k", "densenet121.tv_in1k"])
def test_weights_of_torchvision_fit_with_their_older_names(arch: str) -> None:
    whole = get_model(arch.partition(".")[0], weights=None).eval()
    state = {name: value for name, value in whole.state_dict().items() if not name.endswith("num_batches_tracked")}
    if arch.startswith("densenet"):  # as the published file has it, which torchvision renames, too
        state = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): v for name, v in state.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    model = load_pretrained(arch, 1000, saved(state))
    assert model
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.allclose(model.eval()(images), whole(images), atol=1e-4)


def test_no_weights_are_no_model() -> None:
    assert load_pretrained("test_resnet", 3, folder(None)) is None


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("executed"),)


NO_WEIGHTS: dict[str, object] = {
    "nothing": b"",
    "junk": b"junk",
    "page": b"<!doctype html><title>404</title>",
    "npz": b"PK\x05\x06" + bytes(18),
    "code": pickle.dumps(Code(), 2),
    "code in a checkpoint": Code(),
    "no tensors": {},
    "list": [torch.ones(1)],
    "numbers": {"conv1.0.weight": 3},
    "not by name": {1: torch.ones(1)},
    "half of the other names": {"_conv_stem.weight": torch.ones(1), "_blocks.99._bn0.weight": torch.ones(1)},
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
@pytest.mark.parametrize("arch", ["test_resnet", "test_vit"])
def test_what_holds_no_weights_is_refused(kind: str, arch: str) -> None:
    content = NO_WEIGHTS[kind]
    if isinstance(content, bytes):
        (folder("weights.pth") / "weights.pth").write_bytes(content)
    else:
        saved(content)
    with pytest.raises(BreedlineError, match=f"the weights file:weights.pth are not those of {arch} .*mend weights.s"):
        load_pretrained(arch, 3, Path("weights"))
    assert not Path("executed").exists()


def test_damaged_weights_are_refused() -> None:
    file = saved(trained("test_resnet", 7)) / "weights.pth"
    whole = file.read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        file.write_bytes(whole[:length])
        with pytest.raises(BreedlineError, match="are not those of test_resnet"):
            load_pretrained("test_resnet", 3, file.parent)


@pytest.mark.parametrize("n_classes", [3, 1000])
@pytest.mark.parametrize("other", ["resnet18", "test_vit", "test_efficientnet"])
def test_weights_of_another_architecture_are_refused(other: str, n_classes: int) -> None:
    with pytest.raises(BreedlineError, match=r"are not those of test_resnet \(.+\): mend weights\.source") as caught:
        load_pretrained("test_resnet", 3, saved(trained(other, n_classes)))
    assert len(str(caught.value)) < 400


def test_weights_that_lack_a_layer_are_refused() -> None:
    state = trained("test_resnet", 1000)
    del state["layer1.0.conv1.weight"]
    with pytest.raises(BreedlineError, match=r"Missing key.*layer1\.0\.conv1\.weight"):
        load_pretrained("test_resnet", 3, saved(state))


@pytest.mark.parametrize("file", ["../canary.pth", "{here}/canary.pth", "other.pth"])
def test_a_note_of_weights_leads_to_no_other_file(file: str) -> None:
    torch.save(trained("test_resnet", 1000), "canary.pth")
    with pytest.raises(BreedlineError, match=r"weights\.json is missing or damaged"):
        load_pretrained("test_resnet", 2, folder(file.format(here=Path.cwd())))


def test_statistics_are_those_of_the_pretraining() -> None:
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    assert statistics("resnet34.tv_in1k") == imagenet
    assert statistics("cspresnet50d") == imagenet  # nobody has pretrained it
    assert statistics("vit_base_patch16_224.augreg_in21k") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_a_model_is_of_modules_that_can_be_saved() -> None:
    model = load_pretrained("test_resnet", 3, saved(trained("test_resnet", 1000)))
    assert isinstance(model, nn.Module)
    assert "state_dict" not in model.pretrained_cfg  # a second copy of the weights
