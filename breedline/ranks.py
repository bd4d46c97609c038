"""Which of several processes this is that train one model together, as torchrun tells them; without torch."""

import os


def world() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process, from 0 on. Only rank 0 reports and writes."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def part() -> slice:
    """Which images of a batch this process trains on."""
    return slice(rank(), None, world())
