"""The pipeline's data and models in a notebook: a presized set as fastai's DataLoaders, and Learners.

    learn = learner("models")  # as it was published
    learn.predict("robin.jpg")

    dls = dataloaders("data/presized", "data/labels.csv", "params.yaml")
    learn = learner("models", dls)  # the same, to look at its mistakes and to train on; or, from the pretrained weights:
    learn = new_learner(dls, "data/weights")

From there on all is fastai's own: show_batch, fine_tune, validate, show_results, tta, Interpretation. What the settings
say of the data and the model holds here, too; how long to train, at which rate and in which precision, is for you to say.
"""

import io
from pathlib import Path
from typing import Any, cast

import fastai.vision.all  # noqa: F401 - gives a Learner fine_tune, lr_find and tta, and pictures their show
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from PIL import Image
from torch import nn

from breedline.augment import Transforms
from breedline.bundle import BundleSpec, read_bundle
from breedline.checkpoints import Checkpoints
from breedline.device import machine, pick_device, pick_precision
from breedline.errors import BreedlineError
from breedline.files import cache_dir, sha256_of
from breedline.items import Item, load_items
from breedline.learner import FrozenStatistics, create_learner
from breedline.loader import PixelsDL, data_block
from breedline.losses import loss_function
from breedline.params import Augment, Params, Train, load_params
from breedline.pixels import Store
from breedline.pretrained import read_note
from breedline.probe import fit_head
from breedline.shards import INDEX, PRESIZED_COLUMNS, ShardSet
from breedline.tables import read_csv
from breedline.trained import load_weights
from breedline.training import Training, batch_size
from breedline.views import Geometry
from breedline.zoo import statistics


class ImageLoaders(DataLoaders):
    """fastai's DataLoaders, `train` and `valid`, of a presized set; and the set's images of the split `test`.

    `test_dl` takes items of the set, paths of image files, and images in memory.
    """

    params: Params
    items: list[Item]
    """Of all three splits."""
    data: dict[str, str]
    """SHA-256 of what they were read from, by name."""

    @property
    def test(self) -> PixelsDL:
        """A loader of the split `test`, with labels: for `learn.validate(dl=dls.test)`, or an Interpretation."""
        return self.test_dl([item for item in self.items if item.split == "test"], with_labels=True)


def dataloaders(presized: Path | str, labels: Path | str, params: Params | Path | str) -> ImageLoaders:
    """The loaders of a presized set: as the train stage makes them, augmentation and batch size included.

    Args:
        presized: folder of the presize stage.
        labels: table of the label stage.
        params: the settings, or the path of their file.

    Raises:
        BreedlineError: settings, set or table are missing or damaged, or the images do not fit where `train.keep_images`
            wants them.
    """
    settings = params if isinstance(params, Params) else load_params(Path(params))
    train, presized, labels = settings.train, Path(presized), Path(labels)
    if not labels.is_file():
        raise BreedlineError(f"{labels} is missing: `dvc repro` makes it, `dvc checkout` restores it")
    table = read_csv(labels, ["name", "label", "split", "sha256"])
    images = ShardSet(presized, PRESIZED_COLUMNS)
    items = load_items(images, table)
    known = [item for item in items if item.split != "test"]
    geometry = Geometry(settings.presize.shorter_side, train.image_size, *statistics(train.arch))
    store = Store(images, pick_device(), geometry.max_side)
    trained_on, watched = ([item for item in known if item.split == split] for split in ("train", "valid"))
    store.keep(trained_on, train.keep_images, watched, train.image_size)
    transforms = Transforms(geometry, train.augment)
    at_once = batch_size(train, len(trained_on))
    loaders = data_block(images, sorted(table["label"].unique()), transforms).dataloaders(
        known, bs=at_once, device=store.device, dl_type=PixelsDL, store=store, transforms=transforms
    )
    dls = ImageLoaders(*loaders.loaders, device=store.device)
    dls.params, dls.items = settings, items
    dls.data = {"presized": sha256_of(presized / INDEX), "labels": sha256_of(labels)}
    return dls


def learner(bundle: Path | str, dls: ImageLoaders | None = None) -> Learner:
    """fastai's Learner with the published model in the folder `bundle`, to predict, and with `dls` for all else, too.

    It computes in float32 until you call `to_bf16` or `to_fp16`, so that it predicts what the evaluate stage predicts.

    Raises:
        BreedlineError: there is no whole bundle, or its model sees images otherwise, or knows other classes, than `dls` have.
    """
    bundle = Path(bundle)
    spec = read_bundle(bundle)
    if dls is None:
        model, dls = load_weights(bundle, spec.arch, len(spec.classes)), _without_images(spec)
        return _learner(dls, model, spec.loss)
    train = dls.params.train
    frozen = train.freeze_statistics and dls.params.weights.source != "none"
    return _learner(dls, _published(dls, bundle, spec), spec.loss, train, frozen=frozen)


def new_learner(dls: ImageLoaders, weights: Path | str) -> Learner:
    """fastai's Learner for the loaders' images, with the body in `weights`, before it is fine-tuned; in float32, too.

    With `train.freeze_epochs: fit` its head is fitted to the pretrained body at once; else, or if nothing is pretrained, its
    weights are random.

    Args:
        weights: folder of the weights stage.

    Raises:
        BreedlineError: there are no weights, or those of another architecture.
    """
    train = dls.params.train
    model, pretrained = _before_fine_tuning(dls, Path(weights))
    return _learner(dls, model, train.loss, train, frozen=pretrained and train.freeze_statistics)


def _learner(
    dls: ImageLoaders, model: nn.Module, loss: str, train: Train | None = None, *, frozen: bool = False
) -> Learner:
    """What fastai saves goes into Breedline's cache folder, as the folder `models` is the pipeline's."""
    smoothing, channels_last = (train.label_smoothing, train.channels_last) if train else (0.0, False)
    learn = create_learner(dls, model, loss_function(loss, smoothing), channels_last=channels_last)
    if frozen:
        learn.add_cb(FrozenStatistics())
    learn.model_dir = cache_dir("learners")
    return learn


class _OnePixel(ShardSet):
    """In place of a presized set: fastai looks at an image to learn of which type they are."""

    def __init__(self) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", (1, 1)).save(buffer, "JPEG")
        self.data = buffer.getvalue()

    def read(self, volume: str, offset: int, size: int) -> bytes:
        return self.data


def _without_images(spec: BundleSpec) -> ImageLoaders:
    """Loaders that have no images, and whose `test_dl` shows photos as the model of the bundle saw those it learned from."""
    geometry, images = _geometry(spec), _OnePixel()
    store = Store(images, pick_device(), geometry.max_side)
    transforms = Transforms(
        geometry, Augment(flip=False, max_rotate=0, max_zoom=1, max_warp=0, max_lighting=0, min_scale=1)
    )
    item = Item("", spec.classes[0], "train", "", "", 0, 0, height=1, width=1)
    loaders = data_block(images, spec.classes, transforms).dataloaders(
        [item], device=store.device, dl_type=PixelsDL, store=store, transforms=transforms
    )
    return cast(ImageLoaders, ImageLoaders(*loaders.loaders, device=store.device).new_empty())


def _geometry(spec: BundleSpec) -> Geometry:
    how = spec.preprocessing
    return Geometry(how.shorter_side, how.input_size, how.mean, how.std)


def _published(dls: ImageLoaders, bundle: Path, spec: BundleSpec) -> nn.Module:
    """The model of the bundle, which has to see images as the loaders show them, and to know the same classes."""
    found = {"classes": spec.classes, "geometry": _geometry(spec), "loss": spec.loss}
    wanted: dict[str, Any] = {"classes": list(dls.vocab), "geometry": dls.train.transforms.geometry}
    wanted |= {"loss": dls.params.train.loss}
    if differ := [name for name, value in wanted.items() if found[name] != value]:
        raise BreedlineError(
            f"{bundle} was trained with other settings or labels ({' and '.join(differ)} differ): "
            "take the params.yaml of its commit, or `dvc repro` to make a new one"
        )
    return load_weights(bundle, spec.arch, len(spec.classes))


def _before_fine_tuning(dls: ImageLoaders, weights: Path) -> tuple[nn.Module, bool]:
    """The model that the train stage would fine-tune, and whether its body is pretrained."""
    train, store = dls.params.train, dls.train.store
    precision = pick_precision(train.precision, store.device)
    inputs = {
        "notebook": train.model_dump(),
        "data": {**dls.data, "weights": read_note(weights).sha256},
        "machine": machine(store.device, precision),
    }
    checkpoints, geometry = Checkpoints(inputs), dls.train.transforms.geometry
    known = [item for item in dls.items if item.split != "test"]
    training = Training(
        *(train, list(dls.vocab), known, geometry, weights, store, precision, checkpoints),
        report=cache_dir("learners"),
    )
    head = training.until_it_fits(fit_head) if train.freeze_epochs == "fit" else None
    model, pretrained = training.model()
    if head:
        head.put_on(model)
    checkpoints.clear()
    return model, pretrained
