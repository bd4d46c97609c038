"""Several processes that train one model as one process would: one for each GPU, started by torchrun.

Each process draws the random numbers of the whole batch and sees its part of it; gradients are averaged by torch's
DistributedDataParallel, and what is reported are means over all processes. Rank 0 alone fits the head, writes and
publishes; what the others need of it they read from its checkpoints, which all machines share.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from breedline.ranks import world

RESTARTS = 3
"""Times that torchrun starts all processes again after one of them has died."""


def one_process_for_each_gpu(module: str) -> None:
    """Replace this process by torchrun, if several GPUs are visible and it is not one of torchrun's already."""
    gpus = torch.cuda.device_count()
    if gpus > 1 and "WORLD_SIZE" not in os.environ:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
        command = [sys.executable, *torchrun, f"--max-restarts={RESTARTS}", "-m", module, *sys.argv[1:]]
        os.execv(sys.executable, command)  # noqa: S606 - without a shell


@contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Within it, processes can wait for each other and average; no-op if there is only one."""
    if world() == 1:
        yield
        return
    # rank 0 may take hours to fit a head while the others wait
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        yield
    finally:
        distributed.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        distributed.barrier()


def mean(total: torch.Tensor | float, count: int) -> torch.Tensor | float | None:
    """The mean of what all processes have counted, the sum of their totals by the sum of their counts; None of nothing."""
    if world() == 1:
        return total / count if count else None
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    both = torch.stack([torch.as_tensor(total, device=device), torch.full((), float(count), device=device)])
    distributed.all_reduce(both)
    return both[0] / both[1]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, which DistributedDataParallel may have wrapped."""
    return model.module if isinstance(model, DistributedDataParallel) else model
