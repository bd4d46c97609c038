"""Phase 1 of transfer learning: the head, fitted to convergence on features that the frozen body computes once.

The head is one linear layer, so that fitting it is logistic regression: a convex problem, solved in seconds by L-BFGS,
where epochs of a head of random weights take minutes and end far from its minimum.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial

import torch
from scipy.optimize import minimize_scalar
from torch import nn
from torch.nn.functional import linear

from breedline.features import Extractor
from breedline.interpolation import score
from breedline.items import Item
from breedline.losses import Loss
from breedline.training import Training
from breedline.zoo import linear_head

log = logging.getLogger("breedline")

RANDOM_VIEWS = 4
"""Views of each image beside the central one; with ten images a class they are worth a point of accuracy."""
MAX_ROWS = 20_000
"""With more rows of features than this, images times views, there are fewer random views: they pay where images are few."""
PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Strengths of the L2 penalty to choose from, from the strongest on."""
WHITENING = 0.1
"""How far the features' covariance within classes is whitened; with ten images a class it is worth a point of accuracy."""
FOLDS = 3
"""Parts of the training images, each of which is left out once to choose the penalty."""
LOG_TEMPERATURES = (-7.0, 3.0)
"""Of the temperature by which a head's logits are divided, the natural logarithm: a strong penalty makes them small."""
MIN_STD = 0.1
"""A feature's standard deviation counts as at least so much of the mean one: a nearly constant feature is no signal."""


@dataclass(frozen=True)
class Head:
    """A fitted head: its weights, the strength of its penalty, and valid_loss and accuracy of the model with it."""

    state: dict[str, torch.Tensor]
    penalty: float
    scores: dict[str, float]

    def put_on(self, model: nn.Module) -> None:
        """Make it the head of the model."""
        linear_head(model).load_state_dict(self.state)


def fit_head(training: Training, part: int) -> Head | None:
    """Fit a head to the training images as the pretrained body sees them; None if the body is not pretrained.

    Features and head are kept as checkpoints. Each image has the features of its central view and of up to RANDOM_VIEWS others.

    Args:
        part: images in a batch.

    Raises:
        BreedlineError: weights that do not fit the architecture, or an architecture whose head is not linear.
    """
    model, pretrained = training.model()
    if not pretrained:
        log.info("train: no body is pretrained, so there is no head to fit")
        return None
    kept = training.checkpoints.kept("head")
    if kept:
        return Head(**kept)
    layer = linear_head(model)  # raises before features are computed for nothing
    items, target = training.split("train")
    found = compute_features(training, model.eval(), items, part).to(training.device)
    penalty = fit_linear(layer, found, target, training.loss("none"))
    state = {name: tensor.cpu().clone() for name, tensor in layer.state_dict().items()}
    head = Head(state, penalty, score(training, model, part))
    training.checkpoints.keep("head", vars(head))
    log.info(
        "train: the head alone, fitted to features of the frozen body: valid loss %.4f, accuracy %.4f (penalty %g)",
        *(*head.scores.values(), penalty),
    )
    return head


def compute_features(training: Training, model: nn.Module, items: list[Item], part: int) -> torch.Tensor:
    """The features of the items, (views, images, features) in float32 on the CPU."""
    params, checkpoints = training.params, training.checkpoints
    extractor = Extractor(training.body, model, training.store)
    central = extractor.central(items, part, checkpoints, "train")
    views = max(0, min(RANDOM_VIEWS, MAX_ROWS // len(items) - 1))
    if not views:
        return central
    size = max(1, part // views)
    random = extractor.random(items, size, checkpoints, "train", augment=params.augment, views=views, seed=params.seed)
    return torch.cat([central, random])


def fit_linear(head: nn.Linear, found: torch.Tensor, target: torch.Tensor, loss: Loss) -> float:
    """Fit a linear head to features, and return the strength of the penalty, chosen by cross-validation.

    Each of FOLDS parts of every class's images, all views of an image in the same part, is predicted by heads that did not
    see it. The penalty is the one with the lowest loss there at its best temperature: where images are few, a strong
    penalty ranks the classes best, with logits that are far too small. The head is divided by that temperature at last. So
    that no temperature is 0 where all images are predicted right, labels are smoothed as if one were wrong (Platt, 1999).

    Args:
        found: (views, images, features), as `compute_features` gives them.
        target: (images,) class indices.
        loss: of each row, with reduction `none`.
    """
    views, images, _ = found.shape
    rows, targets = found.flatten(0, 1), target.repeat(views)
    fit = partial(logistic_regression, classes=head.out_features, loss=loss)
    best, penalty, temperature = math.inf, PENALTIES[0], 1.0
    if images >= FOLDS:
        fold = _folds(target).repeat(views).to(rows.device)
        parts = [fold == part for part in range(FOLDS)]
        wanted = torch.cat([targets[part] for part in parts])
        cautious = copy(loss)
        cautious.label_smoothing = max(loss.label_smoothing, 1 / images)
        paths = (fit(rows[~part], targets[~part], PENALTIES) for part in parts)
        for strength, heads in zip(PENALTIES, zip(*paths, strict=True), strict=True):
            logits = torch.cat([linear(rows[part], *one) for part, one in zip(parts, heads, strict=True)])
            lowest, at = _at_best_temperature(logits, wanted, cautious)
            if lowest > best:  # and so for the weaker ones
                break
            best, penalty, temperature = lowest, strength, at
    weight, bias = next(fit(rows, targets, [penalty]))
    with torch.no_grad():
        head.weight.copy_(weight / temperature)
        head.bias.copy_(bias / temperature)
    return penalty


def _folds(target: torch.Tensor) -> torch.Tensor:
    """One of FOLDS parts for each image, at random, but about as many of each class in every part."""
    shuffled = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[target.cpu()[shuffled].argsort(stable=True)]
    return torch.empty_like(shuffled).index_copy_(0, by_class, torch.arange(len(target)).remainder(FOLDS))


def _at_best_temperature(logits: torch.Tensor, targets: torch.Tensor, loss: Loss) -> tuple[float, float]:
    """The lowest mean loss of logits / T, and that temperature T."""
    found = minimize_scalar(
        lambda log: loss(logits / math.exp(log), targets).mean().item(), bounds=LOG_TEMPERATURES, method="bounded"
    )
    return float(found.fun), math.exp(found.x)


def logistic_regression(
    rows: torch.Tensor, targets: torch.Tensor, penalties: Iterable[float], classes: int, loss: Loss
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each penalty the head, weight (classes, features) and bias (classes,), that minimises its objective.

    That is the mean over the classes of their rows' mean loss, plus penalty / 2 |V|². Every class counts the same, or the
    penalty would shrink the rare ones more. V are the weights for whitened features z = L⁻¹ (x - mean) / std, so that
    weight = V L⁻¹ / std, where L Lᵀ = WHITENING C + (1 - WHITENING) I, and C is the covariance of (x - mean) / std within
    classes, scaled to a mean variance of 1 (as in Friedman's regularised discriminant analysis, 1989): a direction in which
    the images of a class differ much tells little about the class.
    """
    std, mean = torch.std_mean(rows, dim=0)
    std = std.clamp(min=MIN_STD * std.mean().item())
    inputs = (rows - mean) / std
    counts = targets.bincount(minlength=classes).clamp(min=1).to(inputs.dtype)
    cholesky = torch.linalg.cholesky(_within(inputs, targets, counts))
    inputs = torch.linalg.solve_triangular(cholesky.T, inputs, upper=True, left=False)
    share = 1 / counts[targets]
    share /= share.sum()
    head = nn.Linear(inputs.shape[1], classes, device=inputs.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    for penalty in penalties:  # each starts from the one before
        solver = torch.optim.LBFGS(
            head.parameters(), max_iter=200, tolerance_change=1e-6, line_search_fn="strong_wolfe"
        )

        def objective(solver: torch.optim.LBFGS = solver, penalty: float = penalty) -> torch.Tensor:
            solver.zero_grad()
            value = share @ loss(head(inputs), targets) + penalty / 2 * head.weight.square().sum()
            value.backward()
            return value

        solver.step(objective)  # type: ignore[no-untyped-call]
        weight = torch.linalg.solve_triangular(cholesky, head.weight.detach(), upper=False, left=False) / std
        yield weight, head.bias.detach() - weight @ mean


def _within(inputs: torch.Tensor, targets: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """WHITENING C + (1 - WHITENING) I of `logistic_regression`, (features, features); counts are those of the classes."""
    sums = inputs.new_zeros(len(counts), inputs.shape[1]).index_add_(0, targets, inputs)
    rest = inputs - (sums / counts.unsqueeze(1))[targets]
    covariance = rest.T @ rest / len(rest)
    variance = covariance.diagonal().mean().clamp(min=torch.finfo(inputs.dtype).tiny)
    identity = torch.eye(inputs.shape[1], device=inputs.device)
    return WHITENING * covariance / variance + (1 - WHITENING) * identity
