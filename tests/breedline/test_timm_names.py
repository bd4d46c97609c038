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
from breedline.learner import create_model, load_weights
from breedline.pretrained import Pretrained, write_note
from breedline.timm_names import timm_names

ARCH = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    path = packaged_weights(ARCH)
    assert path
    return torch.load(path, "cpu", weights_only=True)


def test_the_whole_model_sees_what_is_on_real_photos(published: dict[str, torch.Tensor]) -> None:
    model = timm.create_model(ARCH).eval()
    model.load_state_dict(timm_names(published))
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


def test_the_body_gets_the_published_weights(published: dict[str, torch.Tensor]) -> None:
    folder = Path("weights")
    folder.mkdir()
    torch.save(published, folder / "weights.pth")
    write_note(Pretrained(arch=ARCH, file="weights.pth", url="somewhere"), folder)
    model = create_model(ARCH, 2)
    assert load_weights(model, ARCH, folder)
    body = model[0].model.state_dict()  # type: ignore[index,union-attr]
    assert torch.equal(body["blocks.6.0.bn3.weight"], published["_blocks.15._bn2.weight"])
    torch.save({**published, "_blocks.16._bn2.weight": torch.ones(1)}, folder / "weights.pth")
    with pytest.raises(BreedlineError, match=f"are not those of {ARCH}"):
        load_weights(model, ARCH, folder)
