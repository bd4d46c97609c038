"""The Learner: fastai's, with the optimizer, precision and averages that training uses."""

from functools import partial

import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.core import Callback
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import AvgLoss, AvgMetric, AvgSmoothLoss, Learner
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper
from fastai.torch_core import find_bs
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from breedline.device import autocast
from breedline.errors import BreedlineError
from breedline.ranks import world
from breedline.together import mean, unwrapped
from breedline.zoo import layer_groups

ADAM = partial(torch.optim.AdamW, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.01, fused=True)
"""The hyper-parameters of fastai's Adam, in torch's fused kernel."""


class DeviceLoss(AvgLoss):
    """fastai's mean loss, kept on the device until the epoch ends: reading it at each step would wait for the GPU."""

    def accumulate(self, learn: Learner) -> None:
        images = find_bs(learn.yb)
        self.total += learn.loss.detach().mean() * images
        self.count += images

    @property
    def value(self) -> torch.Tensor | float | None:
        return mean(self.total, self.count)


class DeviceSmoothLoss(AvgSmoothLoss):
    """fastai's moving average of the loss, kept on the device."""

    val: torch.Tensor

    def accumulate(self, learn: Learner) -> None:
        loss = learn.loss.detach().mean()
        if world() > 1:
            images = find_bs(learn.yb)
            loss = torch.as_tensor(mean(loss * images, images))
        self.count += 1
        self.val = torch.lerp(loss, self.val.to(loss.device, non_blocking=True), self.beta)


class DeviceMetric(AvgMetric):
    """fastai's mean of a metric, kept on the device."""

    def accumulate(self, learn: Learner) -> None:
        images = find_bs(learn.yb)
        self.total += self.func(learn.pred, *learn.yb) * images
        self.count += images

    @property
    def value(self) -> torch.Tensor | float | None:
        return mean(self.total, self.count)


class CpuMixedPrecision(Callback):
    """bf16 autocast on the CPU; fastai's MixedPrecision supports CUDA only."""

    order = MixedPrecision.order

    def before_batch(self) -> None:
        self.autocast = autocast(self.dls.device, "bf16")
        self.autocast.__enter__()  # type: ignore[no-untyped-call]

    def after_pred(self) -> None:
        self.learn.pred = self.pred.float()

    def after_loss(self) -> None:
        self.autocast.__exit__(None, None, None)


class FrozenStatistics(Callback):
    """Normalises each batch by the statistics of pretraining, which stay as they are, rather than by the batch's own.

    The statistics of a few images differ so much from those that a pretrained body has learned with that they ruin it.
    """

    def before_train(self) -> None:
        for layer in self.model.modules():
            if isinstance(layer, _BatchNorm):
                layer.eval()


class Together(Callback):
    """Averages the gradients of all processes that train together, as if each batch had not been divided among them."""

    def before_fit(self) -> None:
        self.learn.model = DistributedDataParallel(self.model)

    def after_loss(self) -> None:
        if self.training:  # a process may have an image more than another, but all images count the same
            self.learn.loss_grad = self.loss_grad * (find_bs(self.yb) * world() / self.dls.train.bs)

    def after_fit(self) -> None:
        self.learn.model = unwrapped(self.model)


class Graphs(Callback):
    """Captures the model's kernels at the first batch of a fit, forward and backward, and replays them as CUDA graphs.

    A step of a small model starts some hundred kernels one by one, and the GPU waits for Python to do so. The capture fixes
    the shape of a batch and which layers are frozen. Validation is not captured.
    """

    order = MixedPrecision.order - 1

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def before_fit(self) -> None:
        self.captured = False

    def before_batch(self) -> None:
        if self.captured or not self.training:
            return
        self.captured, device = True, self.dls.device
        # what it tries before it captures may change neither statistics nor random numbers
        kept = [buffer.clone() for buffer in self.model.buffers()]
        sample = self.xb[0].as_subclass(torch.Tensor).clone()
        try:
            with torch.random.fork_rng([device]), autocast(device, self.precision, cache=False):
                torch.cuda.make_graphed_callables(self.model, (sample,))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise BreedlineError(f"train.compile: the model cannot be captured ({reason}): set it to none") from error
        for buffer, value in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(value)

    def after_fit(self) -> None:
        if self.captured:
            del self.model.forward  # the one that replays, which hides the class's own


class InParts(GradientAccumulation):
    """Accumulates gradients over small batches and steps after every `n_acc` images, or more."""

    def before_train(self) -> None:
        # fastai carries gradients over to the next epoch; here what is no whole step by the end of an epoch is dropped
        self.count = 0
        self.learn.opt.zero_grad()


def create_learner(
    dls: DataLoaders, model: nn.Module, loss: nn.Module, *, precision: str = "fp32", channels_last: bool = False
) -> Learner:
    """A Learner with timm's layer groups of the model, in `precision` (bf16, fp16 or fp32).

    Unlike with fastai's Adam, weight decay also applies to biases and normalisation layers.
    """
    callbacks: list[Callback] = [ChannelsLast()] if channels_last else []
    if precision != "fp32" and dls.device.type == "cuda":
        callbacks.append(MixedPrecision(amp_mode=AMPMode.BF16 if precision == "bf16" else AMPMode.FP16))
    elif precision == "bf16":
        callbacks.append(CpuMixedPrecision())
    learn = Learner(
        dls,
        model.to(dls.device),
        loss_func=loss,
        opt_func=partial(OptimWrapper, opt=ADAM),
        splitter=layer_groups,
        metrics=DeviceMetric(accuracy),
        cbs=callbacks,
    )
    learn.recorder.loss, learn.recorder.smooth_loss = DeviceLoss(), DeviceSmoothLoss()
    return learn
