"""Between the head alone and the fine-tuned model: their weights are averaged, and the valid split decides how.

Fine-tuning on few images may unlearn more than it learns. A plain average of the weights before and after often does
better than either (WiSE-FT, Wortsman et al., 2022), and an average of nothing but the former is the head alone: so what is
published is never much worse than that.
"""

import torch
from torch import nn

from breedline.inference import in_batches, infer
from breedline.training import Training
from breedline.views import normalised

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the fine-tuned weights to choose from."""


def score(training: Training, model: nn.Module, part: int) -> dict[str, float]:
    """valid_loss and accuracy of a model on the split `valid`, in batches of `part` images."""
    items, target = training.split("valid")
    geometry = training.geometry
    (logits,) = infer(
        model.eval(),
        training.store.squares(in_batches(items, part), geometry.size),
        lambda squares: [normalised(squares, geometry)],
        device=training.device,
        precision=training.precision,
    )
    loss = training.loss()(logits, target).item()
    accuracy = (logits.argmax(1) == target).double().mean().item()
    return {"valid_loss": round(loss, 6), "accuracy": round(accuracy, 6)}


def publish_best(
    training: Training, part: int, model: nn.Module, before: dict[str, torch.Tensor]
) -> dict[float, dict[str, float]]:
    """Give `model` the average of its weights and those of `before` with the lowest loss on the split `valid`.

    Returns:
        By share of its own weights, the scores of each average; statistics that were trained allow for no average but
        the two ends.
    """
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shares = SHARES if training.params.freeze_statistics else (SHARES[0], SHARES[-1])
    scores = {}
    for share in shares:
        model.load_state_dict(_between(before, after, share))
        scores[share] = score(training, model, part)
    model.load_state_dict(_between(before, after, best(scores)))
    return scores


def best(scores: dict[float, dict[str, float]]) -> float:
    """The share with the lowest loss; of equal ones, the smallest."""
    return min(scores, key=lambda share: (scores[share]["valid_loss"], share))


def _between(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], share: float) -> dict[str, torch.Tensor]:
    if share == 0:
        return before
    return {
        name: torch.lerp(before[name].to(tensor), tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in after.items()
    }
