"""Weights under other names than timm's: as the whole model says of real photos, they are the right ones."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from breedline.architectures import packaged_weights
from breedline.errors import BreedlineError
from breedline.pretrained import Pretrained, write_note
from breedline.timm_names import timm_names
from breedline.zoo import features, linear_head, load_pretrained

ARCH = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    path = packaged_weights(ARCH)
    assert path
    return torch.load(path, "cpu", weights_only=True)


def folder(state: dict[str, torch.Tensor]) -> Path:
    path = Path("weights")
    path.mkdir(exist_ok=True)
    torch.save(state, path / "weights.pth")
    write_note(Pretrained(arch=ARCH, file="weights.pth", source="somewhere"), path)
    return path


def test_the_whole_model_sees_what_is_on_real_photos(published: dict[str, torch.Tensor]) -> None:
    model = load_pretrained(ARCH, 1000, folder(published))
    assert model
    model.eval()
    transform, names = create_transform(**resolve_data_config(model.pretrained_cfg)), ImageNetInfo()
    seen = {}
    photos = load_sample_images()
    for name, pixels in zip(photos.filenames, photos.images, strict=True):
        with torch.inference_mode():
            best = int(model(transform(Image.fromarray(pixels))[None]).argmax())
        seen[Path(name).name] = names.index_to_description(best)
    assert seen == {"china.jpg": "palace", "flower.jpg": "daisy"}


def test_names_that_are_timms_stay() -> None:
    state = timm.create_model(ARCH).state_dict()
    assert timm_names(state) is state


@pytest.mark.parametrize("arch", [ARCH, f"{ARCH}.in1k"])
def test_a_new_head_sees_the_published_features(published: dict[str, torch.Tensor], arch: str) -> None:
    whole, model = load_pretrained(arch, 1000, folder(published)), load_pretrained(arch, 2, folder(published))
    assert whole
    assert model
    images = torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(features(whole.eval(), images), features(model.eval(), images))
    assert torch.equal(linear_head(whole).weight, published["_fc.weight"])
    assert linear_head(model).out_features == 2
    assert torch.equal(model.state_dict()["blocks.6.0.bn3.weight"], published["_blocks.15._bn2.weight"])


def test_a_block_too_many_is_refused(published: dict[str, torch.Tensor]) -> None:
    with pytest.raises(BreedlineError, match=f"are not those of {ARCH}"):
        load_pretrained(ARCH, 2, folder({**published, "_blocks.16._bn2.weight": torch.ones(1)}))
