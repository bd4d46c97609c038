"""What the two phases of a training share: the data, the settings as they apply to it, and the memory there is."""

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

from breedline.checkpoints import Checkpoints
from breedline.device import described, leave_autocast, set_seed
from breedline.errors import BreedlineError
from breedline.features import Body
from breedline.items import Item
from breedline.losses import Loss, loss_function
from breedline.params import Train
from breedline.pixels import Store
from breedline.ranks import world
from breedline.views import Geometry
from breedline.zoo import create_model, load_pretrained

log = logging.getLogger("breedline")
AUTO_BATCH_SIZE = 32
AUTO_EPOCHS = 6
FEW, AUTO_STEPS, AUTO_EPOCHS_OF_FEW = 512, 32, (4, 16)
"""For `train.epochs: auto`: with fewer images than the first, so many steps of fine-tuning, from the fewest to the most epochs."""
AUTO_BASE_LR, AUTO_BASE_LR_FROM_SCRATCH = 2e-3, 5e-3
"""For `train.base_lr: auto`; the first is also the default of fastai's `fine_tune`."""
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Training:
    """One training: settings, data, and where it computes and remembers."""

    params: Train
    classes: list[str]
    items: list[Item]
    """The images of the splits `train` and `valid`."""
    geometry: Geometry
    weights: Path
    """The folder of the weights stage."""
    store: Store
    precision: str
    """bf16, fp16 or fp32."""
    checkpoints: Checkpoints
    report: Path
    """The folder for pictures and the live log."""

    @property
    def device(self) -> torch.device:
        return self.store.device

    def split(self, name: str) -> tuple[list[Item], torch.Tensor]:
        """The images of a split, and their class indices, on the device."""
        items = [item for item in self.items if item.split == name]
        return items, torch.tensor([self.classes.index(item.label) for item in items], device=self.device)

    @property
    def batch_size(self) -> int:
        """Images in a step of the optimizer."""
        return batch_size(self.params, len(self.split("train")[0]))

    def epochs(self, pretrained: bool) -> int:
        """The epochs that are set, or AUTO_EPOCHS; for few images, as many as make AUTO_STEPS; from scratch, thrice that."""
        if self.params.epochs != "auto":
            return self.params.epochs
        images = len(self.split("train")[0])
        least, most = AUTO_EPOCHS_OF_FEW
        few = max(least, min(most, round(AUTO_STEPS * self.batch_size / images)))
        wanted = few if images < FEW else AUTO_EPOCHS
        return wanted if pretrained else 3 * wanted

    def loss(self, reduction: str = "mean") -> Loss:
        """The loss function of the settings."""
        return loss_function(self.params.loss, self.params.label_smoothing, reduction)

    @property
    def body(self) -> Body:
        """The pretrained body, for other machines."""
        return Body(
            self.params.arch,
            len(self.classes),
            self.weights.resolve(),
            self.store.images.folder.resolve(),
            self.geometry,
            self.precision,
            self.params.channels_last,
        )

    def model(self) -> tuple[nn.Module, bool]:
        """The model before any training, on the device, with a random head; whether its body is pretrained.

        Raises:
            BreedlineError: weights that do not fit the architecture.
        """
        set_seed(self.params.seed)
        pretrained = load_pretrained(self.params.arch, len(self.classes), self.weights)
        model = pretrained or create_model(self.params.arch, len(self.classes))
        layout = torch.channels_last if self.params.channels_last else torch.contiguous_format
        return model.to(self.device).to(memory_format=layout), pretrained is not None

    def until_it_fits(
        self, phase: "Callable[Concatenate[Training, int, P], T]", *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call `phase` with the batch size; after each out-of-memory error, with half of it.

        Raises:
            BreedlineError: not even two images fit, the least that batch normalisation can train on; or there are other
                processes, which would go on with whole batches.
        """
        part: int = self.checkpoints.kept("part") or self.batch_size
        while True:
            try:
                return phase(self, part, *args, **kwargs)
            except torch.OutOfMemoryError:
                if world() > 1:
                    raise BreedlineError(
                        f"the memory of {described(self.device)} is too small for its part of {self.batch_size} images: "
                        "choose a smaller train.batch_size or train.image_size"
                    ) from None
                if part <= 2:
                    raise BreedlineError(
                        f"the memory of {described(self.device)} is too small for two images at a time: "
                        "choose a smaller train.image_size or train.arch"
                    ) from None
            part = -(-part // 2)
            self.checkpoints.keep("part", part)
            log.warning("train: out of memory: batches of %d from now on in parts of %d", self.batch_size, part)
            leave_autocast(self.device)
            gc.collect()
            torch.cuda.empty_cache()


def batch_size(params: Train, images: int) -> int:
    """The batch size that is set, or AUTO_BATCH_SIZE; at most the number of `images` to train on."""
    return min(AUTO_BATCH_SIZE if params.batch_size == "auto" else params.batch_size, images)
