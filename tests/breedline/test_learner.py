import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from fastai.optimizer import Adam, OptimWrapper
from safetensors.torch import save_file
from torch import nn

from breedline.bundle import BundleSpec, load_bundle, save_bundle
from breedline.errors import BreedlineError
from breedline.learner import (
    ADAM,
    TORCHVISION,
    Geometry,
    OneVsRestLoss,
    create_model,
    load_weights,
    loss_function,
    machine,
    pick_precision,
    statistics,
)
from breedline.params import Params


def weights(file: str | None) -> Path:
    folder = Path("weights")
    folder.mkdir(exist_ok=True)
    (folder / "weights.json").write_text(json.dumps({"arch": "resnet18", "file": file, "url": f"file:{file}"}))
    return folder


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "test_resnet", "test_vit"])
def test_architectures_of_torchvision_and_timm(arch: str) -> None:
    model = create_model(arch, 5).eval()
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 5)
    mean, std = statistics(arch)
    assert len(mean) == len(std) == 3


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pretrained_weights_fill_the_body_and_leave_the_head(suffix: str) -> None:
    whole = TORCHVISION["resnet18"](weights=None)
    file = weights("weights" + suffix) / ("weights" + suffix)
    torch.save(whole.state_dict(), file) if suffix == ".pth" else save_file(whole.state_dict(), file)
    model = create_model("resnet18", 2)
    head = [parameter.clone() for parameter in model[1].parameters()]  # type: ignore[index]
    assert load_weights(model, "resnet18", file.parent)
    assert torch.equal(model[0][0].weight, whole.conv1.weight)  # type: ignore[index]
    assert torch.equal(model[0][-1][1].conv2.weight, whole.layer4[1].conv2.weight)  # type: ignore[index]
    assert all(torch.equal(old, new) for old, new in zip(head, model[1].parameters(), strict=True))  # type: ignore[index]


def test_timm_weights_fill_the_body() -> None:
    model = create_model("test_resnet", 2)
    state = {name: torch.ones_like(value.float()) for name, value in model[0].model.state_dict().items()}  # type: ignore[index]
    save_file(state, weights("weights.safetensors") / "weights.safetensors")
    assert load_weights(model, "test_resnet", Path("weights"))
    loaded = model[0].model.state_dict()  # type: ignore[index,union-attr]
    assert all(torch.equal(loaded[name].float(), state[name]) for name in loaded)


def test_no_weights_are_no_weights() -> None:
    assert not load_weights(create_model("resnet18", 2), "resnet18", weights(None))


@pytest.mark.parametrize("file", ["../canary.pth", "{here}/canary.pth", "other.pth"])
def test_a_note_of_weights_leads_to_no_other_file(file: str) -> None:
    torch.save(TORCHVISION["resnet18"](weights=None).state_dict(), "canary.pth")
    with pytest.raises(BreedlineError, match=r"weights\.json is missing or damaged"):
        load_weights(create_model("resnet18", 2), "resnet18", weights(file.format(here=Path.cwd())))


class Code:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize("content", ["other", "code", "junk"])
def test_weights_that_do_not_fit_are_refused(content: str) -> None:
    file = weights("weights.pth") / "weights.pth"
    if content == "other":
        torch.save(TORCHVISION["resnet34"](weights=None).state_dict(), file)
    else:
        file.write_bytes(pickle.dumps(Code(), 2) if content == "code" else b"junk")
    with pytest.raises(BreedlineError, match="are not those of resnet18"):
        load_weights(create_model("resnet18", 2), "resnet18", file.parent)
    assert not Path("executed").exists()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_vs_rest_is_binary_cross_entropy_of_every_class(smoothing: float) -> None:
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    wanted = torch.eye(4)[target] * (1 - smoothing) + smoothing / 2
    expected = nn.BCELoss()(logits.sigmoid(), wanted)
    assert torch.allclose(OneVsRestLoss(smoothing)(logits, target), expected, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_log_softmax_and_negative_log_likelihood(smoothing: float) -> None:
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    log_probabilities = nn.functional.log_softmax(logits, dim=1)
    likelihood = nn.functional.nll_loss(log_probabilities, target)
    expected = (1 - smoothing) * likelihood - smoothing * log_probabilities.mean()
    assert torch.allclose(loss_function("cross_entropy", smoothing)(logits, target), expected, atol=1e-6)


def test_softmax_must_choose_but_bce_can_say_none_of_them() -> None:
    nothing = torch.full((1, 4), -5.0)
    assert loss_function("cross_entropy").activation(nothing).sum() == pytest.approx(1)
    assert loss_function("bce").activation(nothing).max() < 0.01


@pytest.mark.parametrize(
    ("wanted", "device", "has", "picked"),
    [
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp16"),
        ("fp32", "cuda", True, "fp32"),
        ("auto", "cpu", True, "bf16"),
        ("auto", "cpu", False, "fp32"),
        ("bf16", "cpu", False, "bf16"),
        ("fp16", "cpu", True, "bf16"),
        ("fp16", "cpu", False, "fp32"),
        ("bf16", "mps", True, "fp32"),
    ],
)
def test_the_precision_is_one_that_the_device_computes_in(
    monkeypatch: pytest.MonkeyPatch, wanted: str, device: str, has: bool, picked: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has, "avx2": True})
    assert pick_precision(wanted, torch.device(device)) == picked


def test_another_number_of_threads_is_another_machine() -> None:
    threads = torch.get_num_threads()
    records = []
    for number in (1, 2):
        torch.set_num_threads(number)
        records.append(machine(torch.device("cpu"), "fp32"))
    torch.set_num_threads(threads)
    assert records[1] == records[0] | {"threads": 2}
    json.dumps(records)


def test_the_optimizer_steps_as_fastai_s_adam_does() -> None:
    weights = []
    for create in (partial(OptimWrapper, opt=ADAM), Adam):
        torch.manual_seed(0)
        layer = nn.Linear(5, 3, bias=False)
        optimizer = create(list(layer.parameters()), lr=0.1)
        optimizer.set_hypers(wd=0.01)
        for momentum in (0.95, 0.9, 0.85):
            optimizer.set_hypers(mom=momentum)
            layer(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(layer.weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


@pytest.fixture
def spec(defaults: Params) -> BundleSpec:
    geometry = Geometry(40, 32, (0.5,) * 3, (0.2,) * 3)
    augment = defaults.train.augment
    return BundleSpec(
        arch="resnet18", classes=["a", "b"], geometry=geometry, augment=augment, loss="bce", data={}, code="0"
    )


def test_a_bundle_gives_back_the_model_and_nothing_but_numbers(spec: BundleSpec) -> None:
    model = create_model("resnet18", 2).eval()
    save_bundle(Path("models"), model, spec)
    again, read = load_bundle(Path("models"))
    assert read == spec
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), again(images))
    assert {file.name for file in Path("models").iterdir()} == {"model.safetensors", "model.json"}


@pytest.mark.parametrize("damage", ["no folder", "cut", "other arch", "other format"])
def test_a_damaged_bundle_is_refused(spec: BundleSpec, damage: str) -> None:
    folder = Path("models")
    if damage != "no folder":
        save_bundle(folder, create_model("resnet18", 2), spec)
    if damage == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    if damage.startswith("other"):
        old, new = ("resnet18", "resnet34") if damage == "other arch" else ("breedline-1", "breedline-9")
        (folder / "model.json").write_text((folder / "model.json").read_text().replace(old, new))
    with pytest.raises(BreedlineError, match="models is no usable bundle"):
        load_bundle(folder)
