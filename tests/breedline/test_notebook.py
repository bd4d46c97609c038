"""What a fastai user does in a notebook, with images of three colours; the model is a tiny one."""

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import Learner
from matplotlib import pyplot as plt
from PIL import Image
from safetensors.torch import save_file

from breedline.bundle import CARD, CONFIG, ONNX, WEIGHTS, seal
from breedline.calibration import probabilities_of
from breedline.device import set_seed
from breedline.errors import BreedlineError
from breedline.files import cache_dir
from breedline.notebook import ImageLoaders, dataloaders, learner, new_learner
from breedline.params import Params
from breedline.preprocessing import Preprocessing
from breedline.pretrained import Pretrained, write_note
from breedline.shards import PRESIZED_COLUMNS, pack, write_index
from breedline.tables import write_csv
from breedline.trained import TrainedSpec, weights
from breedline.zoo import create_model, linear_head
from stages.evaluate import predict

COLOURS = {"blue": (60, 60, 200), "green": (60, 200, 60), "red": (200, 60, 60)}
ARCH = "test_resnet"
SPLITS = ["train"] * 8 + ["valid"] * 4 + ["test"] * 2


def photo(seed: int, colour: tuple[int, ...], width: int = 48) -> bytes:
    """A JPEG that presize keeps as it is: not one pixel too large for the settings below."""
    pixels = np.clip(np.random.default_rng(seed).normal(colour, 40, (40, width, 3)), 0, 255).astype("uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def params(defaults: Params) -> Params:
    """Settings with which the head is fitted."""
    train = {"arch": ARCH, "image_size": 32, "batch_size": 8, "freeze_epochs": "fit", "precision": "fp32"}
    sections = {
        "presize": defaults.presize.model_copy(update={"shorter_side": 40}),
        "train": defaults.train.model_copy(update=train),
    }
    return defaults.model_copy(update=sections)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a presized set and its labels, pretrained weights, and a note that there are none."""
    names = [(f"{colour}_{number}.jpg", colour, split) for colour in COLOURS for number, split in enumerate(SPLITS)]
    files = [(name, photo(number, COLOURS[colour])) for number, (name, colour, _) in enumerate(names)]
    folder = tmp_path / "presized"
    folder.mkdir()
    entries = list(pack(((name, len(data), io.BytesIO(data)) for name, data in files), folder, "00"))
    index = pd.DataFrame([entry._asdict() for entry in entries])
    index = index.assign(height=40, width=48, made="kept", origin=index["sha256"])
    write_index(index[PRESIZED_COLUMNS], folder)
    labels = pd.DataFrame(names, columns=["name", "label", "split"]).assign(sha256=index["sha256"])
    write_csv(labels, tmp_path / "labels.csv")
    set_seed(0)
    (tmp_path / "weights").mkdir()
    save_file(create_model(ARCH, 1000).state_dict(), tmp_path / "weights" / "weights.safetensors")
    write_note(Pretrained(arch=ARCH, file="weights.safetensors", sha256="0" * 64), tmp_path / "weights")
    (tmp_path / "nothing").mkdir()
    write_note(Pretrained(arch=ARCH), tmp_path / "nothing")
    return tmp_path


@pytest.fixture
def dls(data: Path, params: Params) -> ImageLoaders:
    return dataloaders(data / "presized", str(data / "labels.csv"), params)


@pytest.fixture
def quiet(dls: ImageLoaders, data: Path) -> Iterator[Learner]:
    """A Learner with the fitted head, without progress bars; what it draws is thrown away."""
    learn = new_learner(dls, data / "weights")
    with learn.no_bar(), learn.no_logging():
        yield learn
    plt.close("all")


def test_the_loaders_are_those_of_the_settings(dls: ImageLoaders, params: Params) -> None:
    assert (len(dls.train_ds), len(dls.valid_ds), len(dls.test.items)) == (24, 12, 6)
    assert (dls.bs, list(dls.vocab)) == (8, sorted(COLOURS))
    images, targets = dls.one_batch()
    assert images.shape == (8, 3, 32, 32)
    assert targets.shape == (8,)
    assert dls.train.transforms.geometry.item_size == 40


def test_settings_may_be_a_path(data: Path) -> None:
    dls = dataloaders(data / "presized", data / "labels.csv", Path(__file__).parents[2] / "params.yaml")
    assert dls.bs == 24  # the batch size that is set is larger, and would leave no whole batch


def test_a_head_is_fitted_to_pretrained_weights(quiet: Learner, dls: ImageLoaders) -> None:
    _, accuracy = quiet.validate()
    assert accuracy > 0.9
    _, accuracy = quiet.validate(dl=dls.test)
    assert accuracy > 0.8
    assert not list(cache_dir("checkpoints").iterdir())


def test_no_head_is_fitted_where_nothing_is_pretrained_or_the_settings_train_it(
    data: Path, dls: ImageLoaders, params: Params
) -> None:
    set_seed(params.train.seed)
    random = linear_head(create_model(ARCH, 3)).state_dict()
    scratch = linear_head(new_learner(dls, data / "nothing").model).state_dict()
    assert torch.equal(scratch["weight"], random["weight"])
    dls.params = params.model_copy(update={"train": params.train.model_copy(update={"freeze_epochs": 1})})
    learn = new_learner(dls, data / "weights")
    assert learn.validate()[1] < 0.9
    assert "frozen_statistics" in dir(learn)


def test_it_trains_on_with_the_methods_of_fastai(data: Path, dls: ImageLoaders) -> None:
    learn = new_learner(dls, data / "nothing")
    with learn.no_bar(), learn.no_logging():
        before = learn.validate()[0]
        learn.fine_tune(2, 5e-3)
        learn.fit_one_cycle(2, 5e-3)
        assert learn.validate()[0] < before
        assert learn.lr_find(show_plot=False).valley > 0
        learn.save("mine")
    assert (cache_dir("learners") / "mine.pth").is_file()
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("as_what", [Path, str, Image.open], ids=["Path", "str", "PIL image"])
def test_it_predicts_any_image(quiet: Learner, tmp_path: Path, as_what: Callable[[Path], object]) -> None:
    file = tmp_path / "unknown.jpg"
    file.write_bytes(photo(99, COLOURS["green"], width=60))
    label, number, probabilities = quiet.predict(as_what(file))
    assert (label, int(number)) == ("green", 1)
    assert math.isclose(probabilities.sum(), 1, abs_tol=1e-5)
    assert probabilities.argmax() == 1


def test_an_image_in_memory_is_turned_upright(quiet: Learner, tmp_path: Path) -> None:
    half = np.zeros((40, 80, 3), "uint8")
    half[:, :40] = COLOURS["red"]
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "turned.png"
    Image.fromarray(half).save(file, exif=exif)
    with Image.open(file) as image:
        batches = [quiet.dls.test_dl([source]).one_batch()[0] for source in (file, image)]
    assert torch.allclose(*batches, atol=0.05)
    assert batches[0][0, 0, 0].mean() > batches[0][0, 0, -1].mean() + 1  # red is above


def test_a_file_that_is_no_image_is_one_clear_line(quiet: Learner, tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(BreedlineError, match=r"page\.jpg cannot be used .*: save it anew as JPEG or PNG"):
        quiet.predict(tmp_path / "page.jpg")


def test_a_published_model_predicts_what_evaluate_predicts(
    data: Path, dls: ImageLoaders, quiet: Learner, params: Params
) -> None:
    geometry = dls.train.transforms.geometry
    spec = TrainedSpec(
        arch=ARCH,
        classes=list(dls.vocab),
        geometry=geometry,
        augment=params.train.augment,
        pretrained=None,
        loss="cross_entropy",
        data={},
        code="",
    )
    (data / "models").mkdir()
    for name, content in ((WEIGHTS, weights(quiet.model)), (CARD, b""), (CONFIG, b"{}"), (ONNX, b"")):
        (data / "models" / name).write_bytes(content)
    how = Preprocessing(
        shorter_side=geometry.item_size, quality=92, input_size=geometry.size, mean=geometry.mean, std=geometry.std
    )
    fixed = {"temperature": 1.0, "none_below": 0.5, "data": {}, "code": "0" * 64, "versions": {}}
    seal(data / "models", arch=ARCH, classes=spec.classes, preprocessing=how, loss=spec.loss, **fixed)
    learn, store = learner(data / "models", dls), dls.train.store
    items = dls.test.items
    squares = store.squares([items], geometry.size)
    (logits,) = predict(params.evaluate, learn.model, spec, store, items, squares)
    expected = probabilities_of(logits, spec.loss)
    files = []
    for item in items:
        files.append(data / item.name)
        files[-1].write_bytes(store.images.read(item.shard, item.offset, item.size))
    with learn.no_bar():
        many, _ = learn.get_preds(dl=dls.test_dl(files))
        one = learn.predict(files[0])[2]
        known, targets = learn.get_preds(dl=dls.test)
    for found in (many, known):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(one.numpy(), expected[0], atol=1e-5)
    alone = learner(data / "models")  # without any data
    with alone.no_bar():
        label, number, probabilities = alone.predict(files[0])
        without, _ = alone.get_preds(dl=alone.dls.test_dl(files))
    np.testing.assert_allclose(without.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(probabilities.numpy(), expected[0], atol=1e-5)
    assert label == dls.vocab[int(number)] == dls.vocab[expected[0].argmax()]
    assert targets.tolist() == [dls.vocab.o2i[item.label] for item in items]

    dls.params = params.model_copy(update={"train": params.train.model_copy(update={"loss": "bce"})})
    with pytest.raises(BreedlineError, match=r"models was trained with other settings or labels \(loss differ\)"):
        learner(data / "models", dls)


def test_it_shows_images_results_and_mistakes(quiet: Learner, dls: ImageLoaders) -> None:
    dls.show_batch(max_n=4)
    assert {axes.get_title() for axes in plt.gcf().axes} <= set(COLOURS)
    quiet.show_results(max_n=4)
    Interpretation.from_learner(quiet).plot_top_losses(4)
    assert "loss" in plt.gcf().get_suptitle().lower()
    found = ClassificationInterpretation.from_learner(quiet, dl=dls.test)
    found.plot_confusion_matrix()
    assert found.confusion_matrix().sum() == len(dls.test.items)
    augmented, targets = quiet.tta(n=2)
    assert augmented.shape == (len(targets), len(COLOURS))


def test_mistakes_are_one_clear_line(data: Path, dls: ImageLoaders, params: Params) -> None:
    with pytest.raises(BreedlineError, match="nothing is no usable bundle"):
        learner(data / "nothing")
    with pytest.raises(BreedlineError, match=r"gone\.csv is missing: `dvc repro` makes it"):
        dataloaders(data / "presized", data / "gone.csv", params)
