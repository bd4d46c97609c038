"""The device that computes, and what its results depend on: precision, seeds, kernels."""

import logging
import os
import random
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from breedline.ranks import world

log = logging.getLogger("breedline")

BF16_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16")
"""Names in torch.cpu.get_capabilities() of instructions for bf16: x86, x86, ARM."""


def pick_device() -> torch.device:
    """The current CUDA device if there is one (of several processes, each has its own), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        if world() > 1:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
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


def autocast(device: torch.device, precision: str, cache: bool = True) -> torch.autocast:
    """A context in which the model computes in `precision` (bf16, fp16 or fp32); `cache`: each weight is cast once."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32", cache_enabled=cache)


def leave_autocast(device: torch.device) -> None:
    """Leave the autocast context that an exception between two callbacks left entered, and drop its cached casts."""
    if torch.is_autocast_enabled(device.type):
        torch.set_autocast_enabled(device.type, False)
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()


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


def described(device: torch.device) -> str:
    """The device in words, for messages."""
    return f"the CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device_name(device)


def _cpu_capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def set_seed(seed: int) -> None:
    """Seed every random number generator that a training draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def choose_kernels(device: torch.device, deterministic: bool) -> None:
    """Have cuDNN compute the same numbers in every run, or let products of fp32 use TF32.

    cuDNN does not benchmark its algorithms: on an H200 that took 2.5 s in each phase of a training, and won nothing.
    """
    torch.backends.cudnn.deterministic = deterministic
    if device.type == "cuda" and not deterministic:
        torch.set_float32_matmul_precision("high")
