"""How far results are from what they should be: one measure for trials, conversions, benchmarks and tests."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def relative_l2(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| over all elements, in float64, on `wanted`'s device.

    0 where they are equal; infinite where it is no number, so that a result with NaN is never within a bound.
    """
    return relative_l2_of([(found.to(wanted.device, torch.float64), wanted.double())])


def relative_l2_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The same of matrices that come in parts: differences in the parts' dtype, sums in float64."""
    difference = reference = 0.0
    for found, wanted in pairs:
        difference += float((found - wanted).square().sum(dtype=torch.float64))
        reference += float(wanted.square().sum(dtype=torch.float64))
    if difference == 0:
        return 0.0
    ratio = difference / reference if reference else math.inf
    return math.sqrt(ratio) if math.isfinite(ratio) else math.inf
