"""One DataBlock and one Learner, for training and evaluation alike.

After fast.ai's book, chapter 5: each image is cropped to a generous square (at random in training, in the centre
otherwise), then all augmentation and the final resize happen on the batch, on the device ("presizing"); loader.py does
all of it at once. The model is a pretrained body with a new head, trained in the two phases of `fine_tune`.
"""

import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.data.block import CategoryBlock, DataBlock, TransformBlock
from fastai.data.core import DataLoaders
from fastai.data.transforms import FuncSplitter, IntToFloatTensor, Normalize
from fastai.learner import AvgLoss, AvgMetric, AvgSmoothLoss, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import find_bs
from fastai.vision.augment import RandomResizedCropGPU, Resize, aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.learner import create_body, create_timm_model, create_vision_model, default_split, model_meta
from fasttransform import Transform
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from breedline.errors import BreedlineError
from breedline.items import Item
from breedline.params import Augment
from breedline.pretrained import read_note
from breedline.shards import PRESIZED_COLUMNS, ShardSet

log = logging.getLogger("breedline")

TORCHVISION = {arch.__name__: arch for arch in model_meta if not arch.__name__.startswith("xresnet")}
"""The torchvision architectures that fastai knows how to cut into body and head."""
BF16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")
"""What torch calls a CPU's instructions for bf16: x86, x86, ARM."""
ADAM = partial(torch.optim.AdamW, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.01, fused=True)
"""With the settings of fastai's Adam, as one kernel."""
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class OpenImage(Transform):
    """From an `Item` to its picture."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.images = ShardSet(folder, PRESIZED_COLUMNS)

    def encodes(self, item: Item) -> PILImage:
        return PILImage.create(self.images.read(item.shard, item.offset, item.size))


@dataclass(frozen=True)
class Geometry:
    """What the model sees of an image: a crop of `item_size` pixels, reduced to `size`, normalised."""

    item_size: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def max_side(self) -> int:
        """Pixels of the shorter side of an image that are worth keeping: more would be skipped by the interpolation.

        The factor is that of fastai, whose transforms reduce what is larger before they interpolate.
        """
        return min(self.item_size, 2 * self.size)


def data_block(presized: Path, classes: list[str], geometry: Geometry, augment: Augment) -> DataBlock:
    """From items to normalised batches; the images of split `valid` are the validation set."""
    augmentations = aug_transforms(
        do_flip=augment.flip,
        max_rotate=augment.max_rotate,
        max_zoom=augment.max_zoom,
        max_warp=augment.max_warp,
        max_lighting=augment.max_lighting,
    )
    # not left to aug_transforms, which forgets the size where nothing else is asked of it
    window = RandomResizedCropGPU(geometry.size, min_scale=augment.min_scale, ratio=(1, 1))
    return DataBlock(
        blocks=(
            TransformBlock(type_tfms=OpenImage(presized), batch_tfms=IntToFloatTensor),
            CategoryBlock(vocab=classes, sort=False),
        ),
        get_y=attrgetter("label"),
        splitter=FuncSplitter(_is_valid),
        item_tfms=Resize(geometry.item_size),
        batch_tfms=[*augmentations, window, Normalize.from_stats(geometry.mean, geometry.std)],
    )


def _is_valid(item: Item) -> bool:
    return item.split == "valid"


def known_architectures() -> list[str]:
    """What `breedline.architectures` lists: every name that `create_model` takes."""
    return sorted({*TORCHVISION, *timm.list_models(), *timm.list_models(pretrained=True)})


def create_model(arch: str, n_classes: int) -> nn.Module:
    """The model as `vision_learner` makes it, body and head, with random weights."""
    if arch in TORCHVISION:
        return create_vision_model(TORCHVISION[arch], n_classes, pretrained=False)
    model, _ = create_timm_model(arch, n_classes, pretrained=False)
    return model


def statistics(arch: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels that the pretrained weights of `arch` expect, in 0 to 1."""
    if arch in TORCHVISION:
        return IMAGENET_STATS
    config = timm.get_pretrained_cfg(arch)
    return (config.mean, config.std) if config else IMAGENET_STATS


def load_weights(model: nn.Module, arch: str, folder: Path) -> bool:
    """Put the pretrained weights that the weights stage left in `folder` into the body; whether there are any.

    Raises:
        BreedlineError: they are not those of `arch`.
    """
    note = read_note(folder)
    if note.file is None:
        return False
    file = folder / note.file
    body = model[0]  # type: ignore[index]
    try:
        # weights_only: numbers, never code
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        if arch in TORCHVISION:
            whole = TORCHVISION[arch](weights=None)
            whole.load_state_dict(state)
            body.load_state_dict(
                create_body(whole, pretrained=False, cut=model_meta[TORCHVISION[arch]]["cut"]).state_dict()
            )
        else:
            missing = body.model.load_state_dict(state, strict=False).missing_keys
            if missing:
                raise RuntimeError(f"missing {missing[:3]}")
    except (
        RuntimeError,
        SafetensorError,
        UnpicklingError,
        EOFError,
        struct.error,
    ) as error:  # the last three: torch.load
        reason = str(error).strip().splitlines()[-1].strip()
        raise BreedlineError(
            f"the weights {note.url} are not those of {arch} ({reason}): mend weights.source"
        ) from error
    return True


class OneVsRestLoss(nn.Module):
    """Binary cross-entropy of each class against the rest: every class has a probability of its own.

    So that an image may be none of the known classes (fast.ai's book, chapter 6), while targets stay class numbers.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        wanted = nn.functional.one_hot(target, logits.shape[-1]).to(logits.dtype)
        wanted = wanted * (1 - self.label_smoothing) + self.label_smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(logits, wanted)

    def activation(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def decodes(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)


def loss_function(loss: str, label_smoothing: float = 0.0) -> Any:
    """The loss by its name in params.yaml; its `activation` turns logits into probabilities."""
    return OneVsRestLoss(label_smoothing) if loss == "bce" else CrossEntropyLossFlat(label_smoothing=label_smoothing)


def pick_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(wanted: str, device: torch.device) -> str:
    """`wanted`, with `auto` resolved to bf16 where the device computes in it, on CUDA else to fp16, and else to fp32."""
    if device.type == "cuda":
        best = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    else:
        capabilities = _cpu_capabilities() if device.type == "cpu" else {}
        best = "bf16" if any(capabilities.get(name) for name in BF16_CAPABILITIES) else "fp32"
        if wanted == "fp16" or (wanted == "bf16" and device.type != "cpu"):
            log.info("train.precision %s needs CUDA: training in %s", wanted, best)
            return best
    return best if wanted == "auto" else wanted


def machine(device: torch.device, precision: str) -> dict[str, Any]:
    """What a training's result depends on beside its inputs: on another machine, equal inputs give other roundings.

    A CPU's sums are split over its threads and computed by kernels that torch chooses by the CPU's instructions.
    """
    return {
        "device": device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "torch": torch.__version__,  # with its build
        **{package: version(package) for package in ("fastai", "timm")},
    }


def device_name(device: torch.device) -> str:
    """The model of the GPU or CPU, as far as torch knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(_cpu_capabilities().get("cpu_name", "CPU")) if device.type == "cpu" else device.type.upper()


def _cpu_capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def prefer_speed(device: torch.device) -> None:
    """On a GPU, let cuDNN choose its fastest algorithms and fp32 products use TF32: other roundings, from run to run."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
        torch.set_float32_matmul_precision("high")


class DeviceLoss(AvgLoss):
    """fastai's average, left on the device until the epoch ends, so that no step waits for the one before it."""

    def accumulate(self, learn: Learner) -> None:
        images = find_bs(learn.yb)
        self.total += learn.loss.detach().mean() * images
        self.count += images


class DeviceSmoothLoss(AvgSmoothLoss):
    """fastai's moving average, left on the device."""

    val: torch.Tensor

    def accumulate(self, learn: Learner) -> None:
        loss = learn.loss.detach().mean()
        self.count += 1
        self.val = torch.lerp(loss, self.val.to(loss.device, non_blocking=True), self.beta)


class DeviceMetric(AvgMetric):
    """fastai's average of a metric, left on the device."""

    def accumulate(self, learn: Learner) -> None:
        images = find_bs(learn.yb)
        self.total += self.func(learn.pred, *learn.yb) * images
        self.count += images


class CpuMixedPrecision(Callback):
    """What fastai's MixedPrecision does in bf16, on the CPU: that one knows CUDA only."""

    order = MixedPrecision.order

    def before_batch(self) -> None:
        self.autocast = torch.autocast("cpu", torch.bfloat16)
        self.autocast.__enter__()  # type: ignore[no-untyped-call]

    def after_pred(self) -> None:
        self.learn.pred = self.pred.float()

    def after_loss(self) -> None:
        self.autocast.__exit__(None, None, None)


def leave_autocast(device: torch.device) -> None:
    """Autocast is entered and left by callbacks, so an error in between leaves it entered, and its old casts in use."""
    if torch.is_autocast_enabled(device.type):
        torch.set_autocast_enabled(device.type, False)
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()


class InParts(GradientAccumulation):
    """A step for every `n_acc` images, whatever the size of a batch; an epoch leaves out what is no whole step."""

    def before_train(self) -> None:
        self.count = 0
        self.learn.opt.zero_grad()


def create_learner(
    dls: DataLoaders, model: nn.Module, arch: str, loss: Any, *, precision: str = "fp32", channels_last: bool = False
) -> Learner:
    """A Learner with the layer groups of `arch`, in `precision` (bf16, fp16 or fp32).

    Unlike fastai's Adam, the optimizer lets the weights of normalisation layers and biases decay, too.
    """
    callbacks: list[Callback] = [ChannelsLast()] if channels_last else []
    if precision != "fp32" and dls.device.type == "cuda":
        callbacks.append(MixedPrecision(amp_mode=AMPMode.BF16 if precision == "bf16" else AMPMode.FP16))
    elif precision == "bf16":
        callbacks.append(CpuMixedPrecision())
    splitter = model_meta[TORCHVISION[arch]]["split"] if arch in TORCHVISION else default_split
    learn = Learner(
        dls,
        model.to(dls.device),
        loss_func=loss,
        opt_func=partial(OptimWrapper, opt=ADAM),
        splitter=splitter,
        metrics=DeviceMetric(accuracy),
        cbs=callbacks,
    )
    learn.recorder.loss, learn.recorder.smooth_loss = DeviceLoss(), DeviceSmoothLoss()
    return learn
