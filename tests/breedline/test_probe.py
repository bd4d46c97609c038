from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import breedline.probe
from breedline.checkpoints import Checkpoints
from breedline.errors import BreedlineError
from breedline.interpolation import score
from breedline.losses import loss_function
from breedline.probe import PENALTIES, RANDOM_VIEWS, Head, compute_features, fit_head, fit_linear
from breedline.training import Training
from breedline.views import normalised
from breedline.zoo import features

Make = Callable[..., Training]


class Killed(BaseException):
    pass


def found(views: int, images: int, signal: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (views, images, 6) of three classes, which `signal` tells apart, and the classes, (images,)."""
    random = torch.Generator().manual_seed(seed)
    target = torch.arange(images) % 3
    inputs = torch.randn(views, images, 6, generator=random) + signal * torch.eye(6)[target]
    return inputs * torch.tensor([1, 10, 0.5, 1, 1, 1]) + torch.tensor([0, 5, 0, 0, -20, 0]), target


@pytest.fixture
def fixed_penalty(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(breedline.probe, "PENALTIES", (0.01,))
    return 0.01


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_a_head_is_the_minimum_that_scikit_learn_finds(loss: str, views: int, fixed_penalty: float) -> None:
    inputs, target = found(views, 90, signal=1)
    head = nn.Linear(6, 3)
    assert fit_linear(head, inputs, target, loss_function(loss)) == fixed_penalty
    rows, targets = inputs.flatten(0, 1), target.repeat(views)
    standard = ((rows - rows.mean(0)) / rows.std(0)).numpy()
    if loss == "cross_entropy":
        peer = LogisticRegression(C=1 / (len(rows) * fixed_penalty), tol=1e-8, max_iter=1000).fit(standard, targets)
        wanted = peer.predict_proba(standard)
    else:  # a regression per class, of which the loss is the mean
        peers = [LogisticRegression(C=1 / (len(rows) * fixed_penalty * 3), tol=1e-8, max_iter=1000) for _ in range(3)]
        fitted = [peer.fit(standard, targets == number) for number, peer in enumerate(peers)]
        wanted = torch.tensor([peer.predict_proba(standard)[:, 1].tolist() for peer in fitted]).T.numpy()
    probabilities = loss_function(loss).activation(head(rows)).detach()
    assert torch.allclose(probabilities, torch.tensor(wanted, dtype=torch.float32), atol=2e-3)


def test_a_fitted_head_has_no_slope_left(fixed_penalty: float) -> None:
    inputs, target = found(2, 90, signal=1)
    head = nn.Linear(6, 3)
    fit_linear(head, inputs, target, loss_function("cross_entropy", 0.1))
    rows = inputs.flatten(0, 1)
    std = rows.std(0)
    weight = (head.weight.detach() * std).requires_grad_()
    logits = ((rows - rows.mean(0)) / std) @ weight.T + (head.bias + head.weight @ rows.mean(0)).detach()
    objective = (
        loss_function("cross_entropy", 0.1)(logits, target.repeat(2)) + fixed_penalty / 2 * weight.square().sum()
    )
    objective.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-3


def test_noise_is_penalised_more_than_signal() -> None:
    head = nn.Linear(6, 3)
    penalties = [
        fit_linear(head, *found(2, 120, signal), loss_function("cross_entropy")) for signal in (0.0, 3.0, 20.0)
    ]
    assert penalties[0] == max(PENALTIES)
    assert penalties[0] > penalties[1] > penalties[2]
    assert penalties[2] == min(PENALTIES)


def test_no_view_of_an_image_judges_a_head_that_saw_another() -> None:
    # labels without reason, which can be learned by heart: a view left out would be known by its twins
    random = torch.Generator().manual_seed(0)
    views, images = 4, 30
    inputs = torch.randn(1, images, 200, generator=random).expand(views, -1, -1)
    target = torch.randint(0, 2, (images,), generator=random)
    assert fit_linear(nn.Linear(200, 2), inputs, target, loss_function("cross_entropy")) == max(PENALTIES)


def test_too_few_images_to_leave_some_out_get_the_strongest_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breedline.probe, "_held_out", lambda *_: pytest.fail("one has nothing to judge by"))
    inputs, target = found(1, 2, signal=20)
    head = nn.Linear(6, 3)
    assert fit_linear(head, inputs, target, loss_function("cross_entropy")) == max(PENALTIES)
    assert head(inputs[0]).argmax(1).tolist() == target.tolist()


def test_a_feature_that_hardly_varies_counts_for_little() -> None:
    inputs, target = found(2, 90, signal=2)
    inputs[..., 5] = 3.0
    inputs[0, 0, 5] += 1e-4
    head = nn.Linear(6, 3)
    fit_linear(head, inputs, target, loss_function("cross_entropy"))
    assert head.weight[:, 5].abs().max() < 0.01
    assert head.weight.isfinite().all()


def test_features_are_what_the_head_sees_of_the_central_view_and_of_others(training: Make) -> None:
    one = training()
    model = one.model()[0].eval()
    items, _ = one.split("train")
    values = compute_features(one, model, items, 10)
    assert values.shape == (1 + RANDOM_VIEWS, 18, model.num_features)
    (squares,) = one.store.squares([items], one.geometry.size)
    with torch.inference_mode():
        central = features(model, normalised(squares, one.geometry))
    assert torch.allclose(values[0], central, atol=1e-4)
    assert not torch.allclose(values[1], central, atol=1e-2)
    assert not torch.allclose(values[1], values[2], atol=1e-2)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_the_model_with_the_head_says_what_was_fitted(training: Make, loss: str) -> None:
    one = training(loss=loss)
    head = fit_head(one, 10)
    assert head
    model = one.model()[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    head.put_on(model)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"fc.weight", "fc.bias"}
    assert score(one, model, 10) == head.scores
    items, _ = one.split("train")
    fitted = nn.functional.linear(compute_features(one, model, items, 10)[0], head.state["weight"], head.state["bias"])
    (squares,) = one.store.squares([items], one.geometry.size)
    with torch.inference_mode():
        assert torch.allclose(model(normalised(squares, one.geometry)), fitted, atol=1e-4)


def test_without_a_pretrained_body_no_head_is_fitted(training: Make) -> None:
    one = training(pretrained=False)
    assert fit_head(one, 10) is None
    assert one.checkpoints.kept("central-0") is None


def test_a_head_that_is_not_one_linear_layer_is_told_before_features_are_computed(
    training: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("hours for nothing")

    one = training()
    model, _ = one.model()
    model.fc = nn.Sequential(nn.Linear(model.num_features, 2))  # type: ignore[arg-type]
    monkeypatch.setattr(Training, "model", lambda _: (model, True))
    monkeypatch.setattr(breedline.probe, "compute_features", fail)
    with pytest.raises(BreedlineError, match="is not one linear layer"):
        fit_head(one, 10)


def same(one: Head, other: Head) -> bool:
    return vars(one).keys() == vars(other).keys() and all(
        torch.equal(one.state[name], other.state[name]) for name in ("weight", "bias")
    )


@pytest.mark.parametrize(("killed_after", "left"), [(0, 12), (2, 10), (5, 9), (7, 5), (11, 1), (12, 0)])
def test_a_fit_that_is_killed_computes_only_the_rest(
    training: Make, monkeypatch: pytest.MonkeyPatch, killed_after: int, left: int
) -> None:
    monkeypatch.setattr(
        breedline.probe, "CHUNK", 8
    )  # 18 images: 1 + 1 + 1 batches of central views, then 4 + 4 + 1 of random ones
    batches: list[int] = []

    def counted(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        if len(batches) == killed_after and kill:
            raise Killed
        batches.append(len(images))
        return features(model, images)

    def interrupted(*_: Any) -> float:
        raise Killed

    one = training()
    kill = False
    monkeypatch.setattr(breedline.probe, "features", counted)
    whole = fit_head(replace(one, checkpoints=Checkpoints({"another": "training"})), 10)
    assert batches == [8, 8, 2] + [8] * 9
    batches.clear()
    kill = True
    with monkeypatch.context() as patch:
        patch.setattr(breedline.probe, "fit_linear", interrupted)
        with pytest.raises(Killed):
            fit_head(one, 10)
    batches.clear()
    kill = False
    again = fit_head(one, 10)
    assert len(batches) == left
    assert whole
    assert again
    assert same(whole, again)
    assert (whole.penalty, whole.scores) == (again.penalty, again.scores)
    monkeypatch.setattr(breedline.probe, "fit_linear", interrupted)
    kept = fit_head(one, 10)
    assert kept
    assert same(whole, kept)
    assert (whole.penalty, whole.scores) == (kept.penalty, kept.scores)
