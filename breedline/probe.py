"""Phase 1 of transfer learning: the head, fitted to convergence on features that the frozen body computes once.

The head is one linear layer, so that fitting it is logistic regression: a convex problem, solved in seconds by L-BFGS,
where epochs of a head of random weights take minutes and end far from its minimum.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from breedline.device import set_seed
from breedline.inference import in_batches, infer
from breedline.interpolation import score
from breedline.items import Item
from breedline.progress import progress
from breedline.training import Training
from breedline.views import normalised
from breedline.zoo import features, linear_head

log = logging.getLogger("breedline")
T = TypeVar("T")

CHUNK = 4096
"""Images whose features are kept in one checkpoint."""
RANDOM_VIEWS = 4
"""Views of each image beside the central one; with ten images a class they are worth a point of accuracy."""
MAX_ROWS = 20_000
"""With more rows of features than this, images times views, there are fewer random views: they pay where images are few."""
PENALTIES = (0.1, 0.03, 0.01, 0.003, 0.001)
"""Strengths of the L2 penalty to choose from, from the strongest on."""
FOLDS = 3
"""Parts of the training images, each of which is left out once to choose the penalty."""
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
    penalty = fit_linear(layer, found, target, training.loss())
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
    geometry, device, store = training.geometry, training.device, training.store
    central = _features(
        *(training, "central", model, items),
        lambda chunk: store.squares(in_batches(chunk, part), geometry.size),
        lambda squares: [normalised(squares, geometry)],
    )
    count = max(0, min(RANDOM_VIEWS, MAX_ROWS // len(items) - 1))
    if not count:
        return central
    # fastai, which draws the random views, takes as long to import as all else
    from breedline.augment import Transforms

    transforms = Transforms(geometry, training.params.augment)
    random = _features(
        *(training, "random", model, items),
        lambda chunk: store.batches(in_batches(chunk, max(1, part // count))),
        lambda pixels: [transforms.finished(pixels, device) for _ in range(count)],
    )
    return torch.cat([central, random])


def _features(
    training: Training,
    name: str,
    model: nn.Module,
    items: list[Item],
    batches: Callable[[Sequence[Item]], Iterable[T]],
    views: Callable[[T], Sequence[torch.Tensor]],
) -> torch.Tensor:
    """The features of these views of the items; resumable after each CHUNK, by checkpoints that begin with `name`."""
    parts = []
    with progress(f"train (features of {name} views)", len(items)) as advance:
        for number, chunk in enumerate(in_batches(items, CHUNK)):
            found = training.checkpoints.kept(f"{name}-{number}")
            if found is None:
                set_seed(training.params.seed + number)  # so that a resumed run draws the same views
                found = infer(
                    partial(features, model),
                    batches(chunk),
                    views,
                    device=training.device,
                    precision=training.precision,
                    advance=advance,
                ).cpu()
                training.checkpoints.keep(f"{name}-{number}", found)
            parts.append(found)
    return torch.cat(parts, dim=1)


def fit_linear(head: nn.Linear, found: torch.Tensor, target: torch.Tensor, loss: nn.Module) -> float:
    """Fit a linear head to features, and return the strength of the penalty, chosen by cross-validation.

    Minimises the mean of `loss` over all views plus penalty / 2 |W|², with W the weights for standardised features. The
    penalty is the one with the lowest mean loss on FOLDS parts of the images, each predicted by a head that did not see
    it; all views of an image are in the same part.

    Args:
        found: (views, images, features), as `compute_features` gives them.
        target: (images,) class indices.
    """
    views, images, _ = found.shape
    inputs, targets = found.flatten(0, 1), target.repeat(views)
    std, mean = torch.std_mean(inputs, dim=0)
    std = std.clamp(min=MIN_STD * std.mean().item())
    inputs = (inputs - mean) / std
    penalty = PENALTIES[0]
    if images >= FOLDS:
        fold = torch.randperm(images, generator=torch.Generator().manual_seed(0)).remainder(FOLDS).repeat(views)
        fold = fold.to(inputs.device)
        losses = [_held_out(inputs, targets, fold == part, head.out_features, loss) for part in range(FOLDS)]
        penalty = PENALTIES[int(torch.stack(losses).sum(0).argmin())]
    weight, bias = _fitted(inputs, targets, head.out_features, loss, [penalty])[0]
    with torch.no_grad():
        head.weight.copy_(weight / std)
        head.bias.copy_(bias - (weight / std) @ mean)
    return penalty


def _held_out(
    inputs: torch.Tensor, targets: torch.Tensor, left_out: torch.Tensor, classes: int, loss: nn.Module
) -> torch.Tensor:
    """For each of PENALTIES, the loss on the rows that are `left_out` of heads fitted to all others."""
    heads = _fitted(inputs[~left_out], targets[~left_out], classes, loss, PENALTIES)
    rows, wanted = inputs[left_out], targets[left_out]
    return torch.stack([loss(nn.functional.linear(rows, *head), wanted) for head in heads])


def _fitted(
    inputs: torch.Tensor, targets: torch.Tensor, classes: int, loss: nn.Module, penalties: Iterable[float]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight (classes, features) and bias (classes,) of a head for each penalty, each starting from the one before."""
    head = nn.Linear(inputs.shape[1], classes, device=inputs.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    heads = []
    for penalty in penalties:
        solver = torch.optim.LBFGS(
            head.parameters(), max_iter=200, tolerance_change=1e-6, line_search_fn="strong_wolfe"
        )

        def objective(solver: torch.optim.LBFGS = solver, penalty: float = penalty) -> torch.Tensor:
            solver.zero_grad()
            value = loss(head(inputs), targets) + penalty / 2 * head.weight.square().sum()
            value.backward()
            return value

        solver.step(objective)  # type: ignore[no-untyped-call]
        heads.append((head.weight.detach().clone(), head.bias.detach().clone()))
    return heads
