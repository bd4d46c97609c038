from pathlib import Path

import pytest
import torch

from breedline.bundle import BundleSpec, load_bundle, save_bundle
from breedline.errors import BreedlineError
from breedline.params import Params
from breedline.views import Geometry
from breedline.zoo import create_model


@pytest.fixture
def spec(defaults: Params) -> BundleSpec:
    geometry = Geometry(40, 32, (0.5,) * 3, (0.2,) * 3)
    augment = defaults.train.augment
    return BundleSpec(
        arch="test_resnet", classes=["a", "b"], geometry=geometry, augment=augment, loss="bce", data={}, code="0"
    )


def test_a_bundle_gives_back_the_model_and_nothing_but_numbers(spec: BundleSpec) -> None:
    model = create_model("test_resnet", 2).eval()
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
        save_bundle(folder, create_model("test_resnet", 2), spec)
    if damage == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    if damage.startswith("other"):
        old, new = ("test_resnet", "resnet18") if damage == "other arch" else ("breedline-2", "breedline-9")
        (folder / "model.json").write_text((folder / "model.json").read_text().replace(old, new))
    with pytest.raises(BreedlineError, match="models is no usable bundle"):
        load_bundle(folder)
