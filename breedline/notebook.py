"""The pipeline's data and models in a notebook: a presized set as fastai's DataLoaders, and a Learner for them.

    dls = dataloaders("data/presized", "data/labels.csv", "params.yaml")
    learn = learner(dls, bundle="models")  # as it was published; or weights="data/weights", to start from these
    learn.predict("robin.jpg")

From there on all is fastai's own: show_batch, fine_tune, validate, show_results, tta, Interpretation. What the settings
say of the data and the model holds here, too; how long to train, at which rate and in which precision, is for you to say.
"""

from pathlib import Path
from typing import Any

import fastai.vision.all  # noqa: F401 - gives a Learner fine_tune, lr_find and tta, and pictures their show
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn

from breedline.augment import Transforms
from breedline.bundle import read_bundle
from breedline.checkpoints import Checkpoints
from breedline.device import machine, pick_device, pick_precision
from breedline.errors import BreedlineError
from breedline.files import cache_dir, sha256_of
from breedline.items import Item, load_items
from breedline.learner import FrozenStatistics, create_learner
from breedline.loader import PixelsDL, data_block
from breedline.losses import loss_function
from breedline.params import Params, load_params
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
    store.keep(known, train.keep_images)
    transforms = Transforms(geometry, train.augment)
    at_once = batch_size(train, sum(item.split == "train" for item in known))
    loaders = data_block(images, sorted(table["label"].unique()), transforms).dataloaders(
        known, bs=at_once, device=store.device, dl_type=PixelsDL, store=store, transforms=transforms
    )
    dls = ImageLoaders(*loaders.loaders, device=store.device)
    dls.params, dls.items = settings, items
    dls.data = {"presized": sha256_of(presized / INDEX), "labels": sha256_of(labels)}
    return dls


def learner(dls: ImageLoaders, *, weights: Path | str | None = None, bundle: Path | str | None = None) -> Learner:
    """fastai's Learner for the loaders' images, with a model from `weights` or from `bundle`.

    It computes in float32 until you call `to_bf16` or `to_fp16`, so that it predicts what the evaluate stage predicts. What
    fastai saves goes into Breedline's cache folder, as the folder `models` is the pipeline's.

    Args:
        weights: folder of the weights stage. With `train.freeze_epochs: fit` the head is fitted to the pretrained body at
            once; else, or if nothing is pretrained, its weights are random.
        bundle: folder of a published model.

    Raises:
        BreedlineError: not one of the two is given, or what it holds does not fit the loaders' settings.
    """
    train = dls.params.train
    if bundle is not None and weights is None:
        model, pretrained = _published(dls, Path(bundle)), dls.params.weights.source != "none"
    elif weights is not None and bundle is None:
        model, pretrained = _before_fine_tuning(dls, Path(weights))
    else:
        raise BreedlineError('say what to start from: either weights="data/weights" or bundle="models"')
    loss = loss_function(train.loss, train.label_smoothing)
    learn = create_learner(dls, model, loss, channels_last=train.channels_last)
    if pretrained and train.freeze_statistics:
        learn.add_cb(FrozenStatistics())
    learn.model_dir = cache_dir("learners")
    return learn


def _published(dls: ImageLoaders, bundle: Path) -> nn.Module:
    """The model of the bundle, which has to see images as the loaders show them, and to know the same classes."""
    spec = read_bundle(bundle)
    how = spec.preprocessing
    found = {
        "classes": spec.classes,
        "geometry": Geometry(how.shorter_side, how.input_size, how.mean, how.std),
        "loss": spec.loss,
    }
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
