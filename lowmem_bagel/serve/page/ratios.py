"""Picture sizes by their ratio, within what a model can draw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ...checkpoint.folder import ModelFolder

RATIOS = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16), (3, 2), (2, 3), (21, 9), (9, 21))
NEAR = 0.12
"""Logarithm by which a size may miss its ratio, sides being multiples of the model's step."""


class Size(NamedTuple):
    """In pixels."""

    width: int
    height: int


def sizes(folder: ModelFolder) -> Mapping[str, Size]:
    """Those that a model draws well, by their ratio."""
    rule = folder.config.vae_resize
    return sizes_within(min(rule.max_side, folder.max_side), rule.min_side, folder.config.token_pixels)


def sizes_within(longest: int, shortest: int, step: int) -> Mapping[str, Size]:
    """Sizes whose longer side is the longest, whose shorter one is not below the shortest, and each once."""
    found: dict[str, Size] = {}
    for wide, high in RATIOS:
        long = longest // step * step
        short = math.floor(long * min(wide, high) / max(wide, high) / step + 0.5) * step
        size = Size(long, short) if wide >= high else Size(short, long)
        off = abs(math.log(long / short * min(wide, high) / max(wide, high))) if short else math.inf
        if short >= min(shortest, long) and off <= NEAR and size not in found.values():
            found[f"{wide}:{high}"] = size
    return found
