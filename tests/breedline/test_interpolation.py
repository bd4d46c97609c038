from collections.abc import Callable

import pytest
import torch
from torch import nn

import breedline.interpolation
from breedline.interpolation import SHARES, best, publish_best, score
from breedline.training import Training
from breedline.views import normalised

Make = Callable[..., Training]
State = dict[str, torch.Tensor]


def both(training: Training, step: float = 0.1) -> tuple[State, nn.Module]:
    """The weights before, and a model after some steps in no direction."""
    before = training.model()[0].state_dict()
    model, _ = training.model()
    torch.manual_seed(5)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(step * torch.rand_like(tensor))
        else:
            tensor.add_(40)
        assert not torch.equal(tensor, before[name])
    return before, model


def copied(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("part", [1, 2, 4, 100])
def test_a_score_is_loss_and_accuracy_on_valid(training: Make, part: int) -> None:
    one = training(label_smoothing=0.1)
    model, _ = one.model()
    items, target = one.split("valid")
    (squares,) = one.store.squares([items], one.geometry.size)
    with torch.inference_mode():
        logits = model.eval()(normalised(squares, one.geometry))
    found = score(one, model.train(), part)
    assert found["valid_loss"] == pytest.approx(one.loss()(logits, target).item(), abs=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == target).float().mean().item(), abs=1e-6)


@pytest.mark.parametrize("share", SHARES)
def test_the_ends_are_exact_and_between_them_lie_averages(
    training: Make, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    one = training(freeze_statistics=True)
    before, model = both(one)
    after = copied(model)
    monkeypatch.setattr(breedline.interpolation, "best", lambda _: share)
    scores = publish_best(one, 10, model, before)
    assert tuple(scores) == SHARES
    for name, tensor in model.state_dict().items():
        if share in (0, 1):
            assert torch.equal(tensor, (after if share else before)[name]), name
        elif tensor.is_floating_point():
            assert torch.allclose(tensor, (1 - share) * before[name] + share * after[name], atol=1e-5), name


@pytest.mark.parametrize("seed", range(4))
def test_what_is_published_is_the_best_of_all_on_valid(training: Make, seed: int) -> None:
    one = training(freeze_statistics=True, seed=seed)
    before, model = both(one, step=0.02)
    tuned = score(one, model, 10)
    start = score(one, one.model()[0], 10)
    scores = publish_best(one, 10, model, before)
    assert scores[0.0] == start
    assert scores[1.0] == tuned
    published = score(one, model, 10)
    assert published == scores[best(scores)]
    assert published["valid_loss"] == min(found["valid_loss"] for found in scores.values())


def test_trained_statistics_allow_for_the_two_ends_only(training: Make) -> None:
    one = training(freeze_statistics=False)
    before, model = both(one)
    after = copied(model)
    scores = publish_best(one, 10, model, before)
    assert tuple(scores) == (0.0, 1.0)
    wanted = after if best(scores) else before
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ({0.0: 0.5, 0.5: 0.3, 1.0: 0.4}, 0.5),
        ({0.0: 0.3, 0.5: 0.3, 1.0: 0.3}, 0.0),
        ({1.0: 0.2, 0.5: 0.2, 0.0: 0.5}, 0.5),
        ({0.0: 0.5, 1.0: 0.1}, 1.0),
    ],
)
def test_the_lowest_loss_is_best_and_of_equal_ones_the_smallest_share(losses: dict[float, float], share: float) -> None:
    assert best({key: {"valid_loss": loss, "accuracy": key} for key, loss in losses.items()}) == share
