from pathlib import Path

import pytest
import torch

from breedline.errors import BreedlineError
from breedline.params import Params
from breedline.trained import TrainedSpec, load_trained, save_trained
from breedline.views import Geometry
from breedline.zoo import create_model

FOLDER = Path("trained")


@pytest.fixture
def spec(defaults: Params) -> TrainedSpec:
    geometry = Geometry(40, 32, (0.5,) * 3, (0.2,) * 3)
    augment = defaults.train.augment
    return TrainedSpec(
        arch="test_resnet",
        classes=["a", "b"],
        geometry=geometry,
        augment=augment,
        pretrained=None,
        loss="bce",
        data={},
        code="0",
    )


def test_it_gives_back_the_model_and_nothing_but_numbers(spec: TrainedSpec) -> None:
    model = create_model("test_resnet", 2).eval()
    save_trained(FOLDER, model, spec)
    again, read = load_trained(FOLDER)
    assert read == spec
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), again(images))
    assert {file.name for file in FOLDER.iterdir()} == {"model.safetensors", "model.json"}


@pytest.mark.parametrize("damage", ["no folder", "cut", "not finite", "other arch", "other format"])
def test_what_is_damaged_is_refused(spec: TrainedSpec, damage: str) -> None:
    model = create_model("test_resnet", 2)
    if damage == "not finite":
        next(model.parameters()).data[0] = torch.nan
    if damage != "no folder":
        save_trained(FOLDER, model, spec)
    if damage == "cut":
        (FOLDER / "model.safetensors").write_bytes((FOLDER / "model.safetensors").read_bytes()[:1000])
    if damage.startswith("other"):
        old, new = ("test_resnet", "resnet18") if damage == "other arch" else ("breedline-4", "breedline-9")
        (FOLDER / "model.json").write_text((FOLDER / "model.json").read_text().replace(old, new))
    with pytest.raises(BreedlineError, match="trained holds no usable model"):
        load_trained(FOLDER)
