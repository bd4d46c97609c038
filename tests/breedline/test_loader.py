from collections.abc import Callable
from typing import Any

import fastai.vision.learner  # noqa: F401 - shows the top losses of images, as `fastai.vision.all` would
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.interpret import Interpretation
from fastai.learner import Learner
from fastai.torch_core import set_seed
from matplotlib import pyplot as plt

from breedline.augment import Transforms
from breedline.items import Item
from breedline.learner import create_learner
from breedline.loader import PixelsDL, data_block
from breedline.losses import loss_function
from breedline.params import Augment
from breedline.pixels import Store
from breedline.shards import ShardSet
from breedline.views import Geometry
from breedline.zoo import create_model

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
STD = 0.25
Presized = Callable[..., tuple[ShardSet, list[Item]]]
PLAIN = Augment(flip=False, max_rotate=0, max_zoom=1, max_warp=0, max_lighting=0, min_scale=1)
BOOK = Augment(flip=True, max_rotate=10, max_zoom=1.1, max_warp=0.2, max_lighting=0.2, min_scale=0.4)
NARROW, MIXED = (
    [(40, 40 + 3 * number) for number in range(16)],
    [(24 + number, 60 - 2 * number) for number in range(16)],
)
"""Sizes of which no side is below 40 pixels, and sizes above and below."""


def loaders(
    images: ShardSet,
    items: list[Item],
    geometry: Geometry,
    augment: Augment,
    kept: str = "",
    device: torch.device = CPU,
) -> DataLoaders:
    """Our loaders with images kept in place `kept`, or without it fastai's; from equal RNG states."""
    transforms = Transforms(geometry, augment)
    ours: dict[str, Any] = {}
    if kept:
        store = Store(images, device, geometry.max_side)
        store.keep(items, kept)
        ours = {"dl_type": PixelsDL, "store": store, "transforms": transforms}
    set_seed(7)
    block = data_block(images, ["a", "b"], transforms)
    dls = block.dataloaders(items, bs=4, num_workers=0, device=device, **ours)
    set_seed(8)
    return dls


def grey_levels(images: torch.Tensor) -> torch.Tensor:
    """Normalised images as 0 to 255."""
    return (images * STD + 0.5) * 255


def geometry(item_size: int, size: int) -> Geometry:
    return Geometry(item_size, size, (0.5,) * 3, (STD,) * 3)


@pytest.mark.parametrize(
    ("sizes", "item_size", "size", "augment", "most", "on_average"),
    [
        (NARROW, 40, 40, PLAIN, 0.01, 0.01),  # a crop: the very pixels
        (NARROW, 40, 32, PLAIN, 0.01, 0.01),  # reduced on the batch
        (MIXED, 40, 40, PLAIN, 1.001, 0.5),  # enlarged by fastai to whole grey levels
        (MIXED, 40, 32, PLAIN, 8, 0.5),  # enlarged, then reduced: two interpolations in fastai, one in ours
        (NARROW, 40, 32, BOOK, 24, 1),  # fastai's second interpolation blurs
        (MIXED, 40, 32, BOOK, 24, 1),
    ],
)
def test_the_images_are_those_of_fastai(
    presized: Presized,
    sizes: Any,
    item_size: int,
    size: int,
    augment: Augment,
    most: float,
    on_average: float,
) -> None:
    images, items = presized(sizes)
    pairs = [
        list(dls.train)
        for dls in (loaders(images, items, geometry(item_size, size), augment, kept) for kept in ("", "ram"))
    ]
    for (theirs, their_targets), (ours, our_targets) in zip(*pairs, strict=True):
        assert ours.shape == theirs.shape == (4, 3, size, size)
        assert torch.equal(our_targets, their_targets)
        difference = (grey_levels(ours) - grey_levels(theirs)).abs()
        assert difference.max() <= most, difference.max()
        assert difference.mean() <= on_average, difference.mean()


def test_images_much_larger_than_the_view_are_reduced_before_interpolation(presized: Presized) -> None:
    assert geometry(160, 32).max_side == 64
    images, items = presized([(160, 160)] * 8)
    theirs, ours = (loaders(images, items, geometry(160, 32), PLAIN, kept).train.one_batch()[0] for kept in ("", "ram"))
    assert (grey_levels(ours) - grey_levels(theirs)).abs().max() < 10


def test_where_the_images_are_kept_changes_nothing(presized: Presized) -> None:
    images, items = presized(MIXED)
    batches = [list(loaders(images, items, geometry(40, 32), BOOK, kept).train) for kept in ("ram", "disk")]
    for (one, _), (other, _) in zip(*batches, strict=True):
        assert torch.equal(one, other)
    assert batches[0][0][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.parametrize("kept", ["gpu", "ram", "disk"])
def test_a_gpu_sees_what_a_cpu_sees(presized: Presized, kept: str) -> None:
    images, items = presized(MIXED)
    augment = BOOK.model_copy(update={"max_lighting": 0})  # whose numbers the device draws
    pairs = [
        list(loaders(images, items, geometry(40, 32), augment, *where).train) for where in (("ram", CPU), (kept, GPU))
    ]
    for (expected, target), (found, found_target) in zip(*pairs, strict=True):
        assert found.device == found_target.device == GPU
        assert torch.equal(found_target.cpu(), target)
        assert (grey_levels(found.cpu()) - grey_levels(expected)).abs().max() < 0.1


def test_an_epoch_has_other_views_of_the_same_images(presized: Presized) -> None:
    images, items = presized(MIXED)
    dls = loaders(images, items, geometry(40, 32), BOOK, "ram")
    first, second = ([batch[0] for batch in dls.train] for _ in range(2))
    assert not torch.equal(first[0], second[0])
    plain = [[batch[0] for batch in dls.valid] for _ in range(2)]
    assert torch.equal(plain[0][0], plain[1][0])


@pytest.fixture
def learn(presized: Presized) -> Learner:
    images, items = presized(MIXED)
    dls = loaders(images, items, geometry(40, 32), BOOK, "ram")
    return create_learner(dls, create_model("test_resnet", 2), loss_function("cross_entropy"))


def test_it_shows_batches_results_and_losses(learn: Learner) -> None:
    with learn.no_bar():
        learn.dls.show_batch(max_n=4)
        assert {axes.get_title() for axes in plt.gcf().axes} <= {"a", "b"}
        learn.show_results(max_n=4)
        Interpretation.from_learner(learn).plot_top_losses(4)
    assert "loss" in plt.gcf().get_suptitle().lower()
    plt.close("all")


def test_it_predicts_one_image_and_many(learn: Learner) -> None:
    items = learn.dls.valid.items
    with learn.no_bar():
        plain, targets = learn.get_preds(dl=learn.dls.test_dl(items, with_labels=True))
        augmented, _ = learn.tta(dl=learn.dls.test_dl(items), n=2)
        _, _, one = learn.predict(items[1])
    assert targets.tolist() == [learn.dls.vocab.o2i[item.label] for item in items]
    assert torch.allclose(one, plain[1], atol=1e-5)
    assert augmented.shape == plain.shape
    assert not torch.allclose(augmented, plain)


class NoWaiting(Callback):
    def before_train(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def after_train(self) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(presized: Presized) -> None:
    images, items = presized(MIXED * 8)
    dls = loaders(images, items, geometry(40, 32), BOOK, "gpu", GPU)
    learn = create_learner(dls, create_model("test_resnet", 2), loss_function("cross_entropy"), precision="bf16")
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)  # what is prepared once may wait
        learn.fit(1, cbs=NoWaiting())
