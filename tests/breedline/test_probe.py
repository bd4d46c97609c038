from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

import breedline.features
import breedline.probe
from breedline.calibration import fit_temperature
from breedline.checkpoints import Checkpoints
from breedline.errors import BreedlineError
from breedline.interpolation import score
from breedline.losses import Loss, loss_function
from breedline.probe import (
    PENALTIES,
    RANDOM_VIEWS,
    Head,
    compute_features,
    fit_head,
    fit_linear,
    logistic_regression,
)
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


def fitted(penalty: float, rows: torch.Tensor, target: torch.Tensor, loss: Loss) -> torch.Tensor:
    """The logits of the rows, by the head that is fitted to them."""
    return nn.functional.linear(rows, *next(logistic_regression(rows, target, [penalty], 3, loss)))


def whitened(rows: torch.Tensor, target: torch.Tensor) -> np.ndarray:
    """Standardised and whitened by the symmetric root of the inverse: a rotation of what Cholesky's factor gives."""
    standard = ((rows - rows.mean(0)) / rows.std(0)).double().numpy()
    rest = standard - np.stack([standard[target == number].mean(0) for number in range(3)])[target]
    covariance, share = np.cov(rest.T, bias=True), breedline.probe.WHITENING
    values, vectors = np.linalg.eigh(share * covariance / covariance.trace() * 6 + (1 - share) * np.identity(6))
    return standard @ vectors / np.sqrt(values) @ vectors.T


@pytest.mark.parametrize("images", [[30, 30, 30], [60, 20, 10]])
@pytest.mark.parametrize("whitening", [0, 0.1, 0.9])
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_a_head_is_the_minimum_that_scikit_learn_finds(
    loss: str, whitening: float, images: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breedline.probe, "WHITENING", whitening)
    inputs, target = found(1, 180, signal=1)
    rows, target = (values[target.argsort()] for values in (inputs[0], target))
    kept = torch.cat([torch.arange(60 * number, 60 * number + count) for number, count in enumerate(images)])
    rows, target = rows[kept], target[kept]
    rows[:, 1] += 3 * rows[:, 0]
    penalty = 0.01
    settings: dict[str, Any] = {"class_weight": "balanced", "tol": 1e-8, "max_iter": 1000}
    inputs = torch.tensor(whitened(rows, target))
    weights = len(target) / 3 / target.bincount()[target]
    if loss == "cross_entropy":
        peer = LogisticRegression(C=1 / (len(rows) * penalty), **settings).fit(inputs, target)
        wanted = peer.predict_proba(inputs)
    else:  # a regression per class, of which the loss is the mean
        settings.pop("class_weight")
        peers = [LogisticRegression(C=1 / (len(rows) * penalty * 3), **settings) for _ in range(3)]
        each = [peer.fit(inputs, target == number, weights) for number, peer in enumerate(peers)]
        wanted = np.stack([peer.predict_proba(inputs)[:, 1] for peer in each], axis=1)
    probabilities = loss_function(loss).activation(fitted(penalty, rows, target, loss_function(loss, reduction="none")))
    assert torch.allclose(probabilities, torch.tensor(wanted, dtype=torch.float32), atol=2e-3)


def test_a_fitted_head_has_no_slope_left() -> None:
    inputs, target = found(1, 90, signal=1)
    rows, loss = inputs[0], loss_function("cross_entropy", 0.1, "none")
    logits = fitted(0.01, rows, target, loss).requires_grad_()
    slope = torch.autograd.grad(loss(logits, target).mean(), logits)[0]
    assert slope.sum(0).abs().max() < 1e-3  # of the bias, which has no penalty
    weight, _ = next(logistic_regression(rows, target, [0.01], 3, loss))
    white = torch.tensor(whitened(rows, target), dtype=torch.float32)
    of_white = torch.linalg.lstsq(white, rows @ weight.T - (rows @ weight.T).mean(0)).solution
    assert torch.allclose(white.T @ slope, -0.01 * of_white, atol=1e-3)


def test_classes_that_features_tell_apart_get_a_weak_penalty() -> None:
    loss = loss_function("cross_entropy", reduction="none")
    assert fit_linear(nn.Linear(6, 3), *found(1, 120, signal=20), loss) <= 0.003


def test_few_images_get_a_strong_penalty_and_logits_as_large_as_they_may_be() -> None:
    random = torch.Generator().manual_seed(0)
    target = torch.arange(3000) % 3
    inputs = torch.randn(3000, 200, generator=random) + 0.3 * torch.randn(3, 200, generator=random)[target]
    head = nn.Linear(200, 3)
    penalty = fit_linear(head, inputs[None, :30], target[:30], loss_function("cross_entropy", reduction="none"))
    assert penalty >= 1
    with torch.no_grad():
        temperature = fit_temperature(head(inputs[30:]).numpy(), target[30:].numpy(), "cross_entropy")
    assert 0.4 < temperature < 1.1  # labels are smoothed by 1 in 30


def test_rare_classes_are_found_as_often_as_others() -> None:
    inputs, target = found(1, 1200, signal=1.5)
    kept = torch.cat([torch.where(target == number)[0][:count] for number, count in enumerate((200, 20, 5))])
    head = nn.Linear(6, 3)
    fit_linear(head, inputs[:, kept], target[kept], loss_function("cross_entropy", reduction="none"))
    predicted = head(inputs[0, 600:]).argmax(1)
    shares = predicted.bincount(minlength=3) / len(predicted)
    assert shares.min() > 0.2


def test_no_view_of_an_image_judges_a_head_that_saw_another() -> None:
    # labels without reason, which can be learned by heart: a view left out would be known by its twins
    random = torch.Generator().manual_seed(0)
    views, images = 4, 30
    inputs = torch.randn(1, images, 200, generator=random).expand(views, -1, -1)
    target = torch.randint(0, 2, (images,), generator=random)
    assert fit_linear(nn.Linear(200, 2), inputs, target, loss_function("cross_entropy", reduction="none")) == max(
        PENALTIES
    )


def test_too_few_images_to_leave_some_out_get_the_strongest_penalty() -> None:
    inputs, target = found(1, 2, signal=20)
    head = nn.Linear(6, 3)
    assert fit_linear(head, inputs, target, loss_function("cross_entropy", reduction="none")) == max(PENALTIES)
    assert head(inputs[0]).argmax(1).tolist() == target.tolist()


def test_a_class_of_one_image_is_left_out_of_one_part_only() -> None:
    inputs, target = found(1, 31, signal=20)
    target[:-1] %= 2
    target[-1] = 2
    inputs[0, -1] += 20
    head = nn.Linear(6, 3)
    fit_linear(head, inputs, target, loss_function("cross_entropy", reduction="none"))
    assert head(inputs[0, -1]).argmax() == 2


def test_a_feature_that_hardly_varies_counts_for_little() -> None:
    inputs, target = found(2, 90, signal=2)
    inputs[..., 5] = 3.0
    inputs[0, 0, 5] += 1e-4
    head = nn.Linear(6, 3)
    fit_linear(head, inputs, target, loss_function("cross_entropy", reduction="none"))
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
        breedline.features, "CHUNK", 8
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
    monkeypatch.setattr(breedline.features, "features", counted)
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
