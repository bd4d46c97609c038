from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastai.learner import AvgLoss, AvgSmoothLoss, Learner
from fastai.metrics import accuracy
from fastai.torch_core import set_seed

from breedline.augment import Transforms
from breedline.errors import BreedlineError
from breedline.finetune import fine_tune, run_phases
from breedline.learner import create_learner
from breedline.loader import PixelsDL, data_block
from breedline.training import Training
from breedline.zoo import create_model

Make = Callable[..., Training]


def learner(training: Training) -> Learner:
    transforms = Transforms(training.geometry, training.params.augment)
    block = data_block(training.store.images, training.classes, transforms)
    how = {"dl_type": PixelsDL, "store": training.store, "transforms": transforms}
    dls = block.dataloaders(training.items, bs=6, device=training.device, **how)
    return create_learner(dls, create_model("test_resnet", 2), training.loss())


@pytest.mark.parametrize("freeze_epochs", [1, 2])
def test_the_phases_are_those_of_fine_tune(training: Make, freeze_epochs: int) -> None:
    one = training()

    def train(run: Any) -> tuple[dict[str, torch.Tensor], list[Any]]:
        set_seed(1, reproducible=True)
        learn = learner(one)
        if run is theirs:
            learn.recorder.loss, learn.recorder.smooth_loss = AvgLoss(), AvgSmoothLoss()
            learn.metrics = [accuracy]
        with learn.no_bar(), learn.no_logging():
            run(learn)
        return learn.model.state_dict(), [list(epoch) for epoch in learn.recorder.values]

    def theirs(learn: Learner) -> None:
        learn.fine_tune(2, 0.004, freeze_epochs=freeze_epochs)

    ours, our_values = train(lambda learn: run_phases(learn, freeze_epochs, 2, 0.004, lr_ratio=100))
    fastai, their_values = train(theirs)
    assert all(torch.equal(ours[name], fastai[name]) for name in ours)
    assert our_values == their_values
    assert len(our_values[-1]) == 3


@pytest.mark.parametrize("lr_ratio", [1.0, 3.0, 100.0])
def test_the_first_layers_learn_more_slowly_by_the_ratio(training: Make, lr_ratio: float) -> None:
    learn = learner(training())
    with learn.no_bar(), learn.no_logging():
        run_phases(learn, 0, 1, 0.004, lr_ratio)
    rates = [hyper["lr"] for hyper in learn.opt.hypers]
    assert rates[-1] / rates[0] == pytest.approx(lr_ratio)
    assert rates == sorted(rates)


def test_each_process_needs_an_image_of_a_batch(training: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "11")
    with pytest.raises(BreedlineError, match=r"11 processes share batches of 10 images: raise train\.batch_size"):
        fine_tune(training(), 10, None)
