"""The loss functions: what a model's outputs mean, and how wrong they are."""

import torch
from torch import nn


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross-entropy of a softmax over the classes, with what fastai asks of a loss: `activation` and `decodes`."""

    def activation(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1)

    def decodes(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)


class OneVsRestLoss(nn.Module):
    """Binary cross-entropy of each class against the rest, so that an image may be none of the known classes.

    After fast.ai's book, chapter 6, but with class indices as targets: logits are (images, classes), targets (images,).
    """

    def __init__(self, label_smoothing: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        self.label_smoothing, self.reduction = label_smoothing, reduction

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        wanted = nn.functional.one_hot(target, logits.shape[-1]).to(logits.dtype)
        wanted = wanted * (1 - self.label_smoothing) + self.label_smoothing / 2
        losses = nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(-1)
        return losses.mean() if self.reduction == "mean" else losses

    def activation(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def decodes(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)


Loss = CrossEntropyLoss | OneVsRestLoss


def loss_function(loss: str, label_smoothing: float = 0.0, reduction: str = "mean") -> Loss:
    """The loss function for `train.loss`; its `activation` turns logits into probabilities."""
    kind = OneVsRestLoss if loss == "bce" else CrossEntropyLoss
    return kind(label_smoothing=label_smoothing, reduction=reduction)
