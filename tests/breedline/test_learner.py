from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import Adam, OptimWrapper
from torch import nn

from breedline.errors import BreedlineError
from breedline.learner import ADAM, FrozenStatistics, Graphs, create_learner
from breedline.losses import loss_function
from breedline.zoo import create_model


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


def learner(model: nn.Module) -> Learner:
    """A learner of a few random images of two classes."""
    batch = [(torch.rand(3, 32, 32), torch.tensor(number % 2)) for number in range(8)]
    dls = DataLoaders(*(DataLoader(batch, bs=4, num_workers=0) for _ in range(2)), device=torch.device("cpu"))
    return create_learner(dls, model, loss_function("cross_entropy"))


def test_layers_learn_in_timm_s_groups() -> None:
    learn = learner(create_model("test_resnet", 2))
    learn.freeze()
    trained = {name for name, tensor in learn.model.named_parameters() if tensor.requires_grad}
    assert {"fc.weight", "fc.bias"} <= trained
    assert "conv1.0.weight" not in trained
    assert "layer1.0.bn1.weight" in trained, "fastai trains normalisation in the frozen phase, too"
    learn.create_opt()
    assert len(learn.opt.param_lists) > 3
    assert [tuple(parameter.shape) for parameter in learn.opt.param_lists[-1]] == [(2, learn.model.num_features), (2,)]


def test_frozen_statistics_stay_and_all_else_learns() -> None:
    learn = learner(create_model("test_resnet", 2))
    learn.add_cb(FrozenStatistics())
    before = {name: tensor.clone() for name, tensor in learn.model.state_dict().items()}
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.1)
    after = learn.model.state_dict()
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    statistics = {name for name, _ in learn.model.named_buffers()}
    assert len(statistics) > 10
    assert same == statistics


def _capture(model: nn.Module, samples: tuple[torch.Tensor]) -> None:
    """What torch.cuda.make_graphed_callables does to a model: tries it, and puts another forward before it."""
    for _ in range(3):
        model(*samples)
    eager = model.forward
    model.forward = lambda inputs: eager(inputs)


def _trained(*callbacks: Any) -> nn.Module:
    torch.manual_seed(0)
    learn = learner(create_model("test_resnet", 2))
    learn.add_cbs(callbacks)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.1)
    return learn.model


def test_the_capture_of_a_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.random, "fork_rng", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", _capture)
    kernels, graphs = _trained(), _trained(Graphs("fp32"))
    assert all(map(torch.equal, kernels.state_dict().values(), graphs.state_dict().values()))
    assert "forward" not in vars(graphs)


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (
            RuntimeError("CUDA error: not permitted\nCompile with"),
            BreedlineError,
            r"compile: .*not permitted\): set it",
        ),
        (torch.OutOfMemoryError("no room"), torch.OutOfMemoryError, "no room"),
    ],
)
def test_a_model_that_cannot_be_captured_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception], said: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(torch.random, "fork_rng", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(raised, match=said):
        _trained(Graphs("fp32"))
