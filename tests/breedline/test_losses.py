import pytest
import torch
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from breedline.losses import OneVsRestLoss, loss_function


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_vs_rest_is_binary_cross_entropy_of_every_class(smoothing: float) -> None:
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    wanted = torch.eye(4)[target] * (1 - smoothing) + smoothing / 2
    expected = nn.BCELoss()(logits.sigmoid(), wanted)
    assert torch.allclose(OneVsRestLoss(smoothing)(logits, target), expected, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_log_softmax_and_negative_log_likelihood(smoothing: float) -> None:
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    log_probabilities = nn.functional.log_softmax(logits, dim=1)
    likelihood = nn.functional.nll_loss(log_probabilities, target)
    expected = (1 - smoothing) * likelihood - smoothing * log_probabilities.mean()
    assert torch.allclose(loss_function("cross_entropy", smoothing)(logits, target), expected, atol=1e-6)


def test_softmax_must_choose_but_bce_can_say_none_of_them() -> None:
    nothing = torch.full((1, 4), -5.0)
    assert loss_function("cross_entropy").activation(nothing).sum() == pytest.approx(1)
    assert loss_function("bce").activation(nothing).max() < 0.01


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_the_loss_of_each_image_is_asked_for_as_fastai_does(loss: str) -> None:
    logits, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    function = loss_function(loss, 0.1)
    mean = function(logits, target)
    function.reduction = "none"
    assert function(logits, target).shape == (6,)
    assert torch.allclose(function(logits, target).mean(), mean, atol=1e-6)


def test_fastai_decodes_and_activates_alike() -> None:
    logits = torch.randn(6, 4)
    ours, theirs = loss_function("cross_entropy"), CrossEntropyLossFlat()
    assert torch.equal(ours.decodes(logits), theirs.decodes(logits))
    assert torch.equal(ours.activation(logits), theirs.activation(logits))
    assert torch.equal(loss_function("bce").decodes(logits), theirs.decodes(logits))
