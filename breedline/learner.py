"""The DataBlock, the model and the Learner that training and evaluation share.

After fast.ai's book, chapter 5 ("presizing"): each image is cropped to a generous square (at random in training, at the
centre otherwise); augmentation and the final resize run on the batch, on the device. loader.py does both in one
interpolation. The model is a pretrained body with a new head.
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
from breedline.timm_names import timm_names

log = logging.getLogger("breedline")

TORCHVISION = {arch.__name__: arch for arch in model_meta if not arch.__name__.startswith("xresnet")}
"""The torchvision architectures that fastai can cut into body and head, by name."""
BF16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")
"""Names in torch.cpu.get_capabilities() of instructions for bf16: x86, x86, ARM."""
ADAM = partial(torch.optim.AdamW, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.01, fused=True)
"""The hyper-parameters of fastai's Adam, in torch's fused kernel."""
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class OpenImage(Transform):
    """fastai's item transform from an `Item` to its decoded image."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.images = ShardSet(folder, PRESIZED_COLUMNS)

    def encodes(self, item: Item) -> PILImage:
        return PILImage.create(self.images.read(item.shard, item.offset, item.size))


@dataclass(frozen=True)
class Geometry:
    """What the model sees of an image."""

    item_size: int
    """Pixels of the square cropped from a presized image."""
    size: int
    """Pixels of the square that the model takes."""
    mean: tuple[float, ...]
    """Per channel, in 0 to 1; what normalisation subtracts."""
    std: tuple[float, ...]
    """What it divides by."""

    @property
    def max_side(self) -> int:
        """The longest shorter side, in pixels, that a decoded image needs.

        Bilinear interpolation reads four pixels per output pixel: of an image more than twice as large it would skip
        some. fastai's transforms first reduce such images to twice the size, too.
        """
        return min(self.item_size, 2 * self.size)


def data_block(presized: Path, classes: list[str], geometry: Geometry, augment: Augment) -> DataBlock:
    """From items to normalised batches; split `valid` is the validation set, all other items are the training set."""
    augmentations = aug_transforms(
        do_flip=augment.flip,
        max_rotate=augment.max_rotate,
        max_zoom=augment.max_zoom,
        max_warp=augment.max_warp,
        max_lighting=augment.max_lighting,
    )
    # aug_transforms has a `size`, too, but drops it if no affine transform is asked for
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
    """Every name that `create_model` accepts; breedline.architectures is the generated list of them."""
    return sorted({*TORCHVISION, *timm.list_models(), *timm.list_models(pretrained=True)})


def create_model(arch: str, n_classes: int) -> nn.Module:
    """The model that `vision_learner` would create, body and head, with random weights."""
    if arch in TORCHVISION:
        return create_vision_model(TORCHVISION[arch], n_classes, pretrained=False)
    model, _ = create_timm_model(arch, n_classes, pretrained=False)
    return model


def statistics(arch: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, in 0 to 1, with which the weights of `arch` were pretrained."""
    if arch in TORCHVISION:
        return IMAGENET_STATS
    config = timm.get_pretrained_cfg(arch)
    return (config.mean, config.std) if config else IMAGENET_STATS


def load_weights(model: nn.Module, arch: str, folder: Path) -> bool:
    """Load the pretrained weights of the weights stage into the body; False if `folder` holds none.

    Raises:
        BreedlineError: the weights do not fit `arch`.
    """
    note = read_note(folder)
    if note.file is None:
        return False
    file = folder / note.file
    body = model[0]  # type: ignore[index]
    try:
        # weights_only: a pickle may run code, this loads tensors and nothing else
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        if arch in TORCHVISION:
            whole = TORCHVISION[arch](weights=None)
            whole.load_state_dict(state)
            body.load_state_dict(
                create_body(whole, pretrained=False, cut=model_meta[TORCHVISION[arch]]["cut"]).state_dict()
            )
        else:
            missing = body.model.load_state_dict(timm_names(state), strict=False).missing_keys
            if missing:
                raise RuntimeError(f"missing {missing[:3]}")
    except (
        RuntimeError,
        SafetensorError,
        UnpicklingError,
        EOFError,
        struct.error,
        LookupError,
    ) as error:  # of torch.load, the last but for LookupError: a name that is not known
        reason = str(error).strip().splitlines()[-1].strip()
        raise BreedlineError(
            f"the weights {note.url} are not those of {arch} ({reason}): mend weights.source"
        ) from error
    return True


class OneVsRestLoss(nn.Module):
    """Binary cross-entropy of each class against the rest, so that an image may be none of the known classes.

    After fast.ai's book, chapter 6, but with class indices as targets: logits are (images, classes), targets (images,).
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
    """The loss function for `train.loss`; its `activation` turns logits into probabilities."""
    return OneVsRestLoss(label_smoothing) if loss == "bce" else CrossEntropyLossFlat(label_smoothing=label_smoothing)


def pick_device() -> torch.device:
    """The current CUDA device if there is one, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(wanted: str, device: torch.device) -> str:
    """The precision to train in: bf16, fp16 or fp32.

    `auto` is bf16 if the device has instructions for it, else fp16 on CUDA, else fp32. What the device cannot do is
    replaced by what `auto` would be, with a log line.
    """
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
    """What a training's result depends on besides its inputs, as values that JSON can hold.

    With any of it changed, equal inputs and seeds give other rounding errors, which training amplifies: a CPU splits its
    sums over its threads, and torch chooses kernels by the instructions that the CPU has.
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
    """On a GPU, let cuDNN benchmark its algorithms, and matrix products in fp32 use TF32: faster, but not deterministic."""
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
        torch.set_float32_matmul_precision("high")


class DeviceLoss(AvgLoss):
    """fastai's mean loss, kept on the device until the epoch ends: reading it at each step would wait for the GPU."""

    def accumulate(self, learn: Learner) -> None:
        images = find_bs(learn.yb)
        self.total += learn.loss.detach().mean() * images
        self.count += images


class DeviceSmoothLoss(AvgSmoothLoss):
    """fastai's moving average of the loss, kept on the device."""

    val: torch.Tensor

    def accumulate(self, learn: Learner) -> None:
        loss = learn.loss.detach().mean()
        self.count += 1
        self.val = torch.lerp(loss, self.val.to(loss.device, non_blocking=True), self.beta)


class DeviceMetric(AvgMetric):
    """fastai's mean of a metric, kept on the device."""

    def accumulate(self, learn: Learner) -> None:
        images = find_bs(learn.yb)
        self.total += self.func(learn.pred, *learn.yb) * images
        self.count += images


class CpuMixedPrecision(Callback):
    """bf16 autocast on the CPU; fastai's MixedPrecision supports CUDA only."""

    order = MixedPrecision.order

    def before_batch(self) -> None:
        self.autocast = torch.autocast("cpu", torch.bfloat16)
        self.autocast.__enter__()  # type: ignore[no-untyped-call]

    def after_pred(self) -> None:
        self.learn.pred = self.pred.float()

    def after_loss(self) -> None:
        self.autocast.__exit__(None, None, None)


def leave_autocast(device: torch.device) -> None:
    """Leave the autocast context that an exception between two callbacks left entered, and drop its cached casts."""
    if torch.is_autocast_enabled(device.type):
        torch.set_autocast_enabled(device.type, False)
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()


class InParts(GradientAccumulation):
    """Accumulates gradients over small batches and steps after every `n_acc` images, or more."""

    def before_train(self) -> None:
        # fastai carries gradients over to the next epoch; here what is no whole step by the end of an epoch is dropped
        self.count = 0
        self.learn.opt.zero_grad()


def create_learner(
    dls: DataLoaders, model: nn.Module, arch: str, loss: Any, *, precision: str = "fp32", channels_last: bool = False
) -> Learner:
    """A Learner with the layer groups of `arch`, in `precision` (bf16, fp16 or fp32).

    Unlike with fastai's Adam, weight decay also applies to biases and normalisation layers.
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
