"""Rounding a checkpoint in float32 or float16 to bf16: as loading does, with what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Norms = tuple[float, float]
"""The squared norms of what is lost, and of the whole."""


def round_into(target: Tensor, values: Tensor) -> Norms:
    """Fill a bf16 tensor with values of a wider dtype or another range, each rounded to the nearest, half to even."""
    import torch

    target.copy_(values)
    wide = values.float()
    lost = target.float().sub_(wide)
    if not bool(torch.isfinite(lost.sum())):  # what is infinite, or becomes so, has no error to speak of
        finite = torch.isfinite(lost)
        lost, wide = lost.where(finite, 0), wide.where(finite, 0)
    return float(torch.linalg.vector_norm(lost)) ** 2, float(torch.linalg.vector_norm(wide)) ** 2


def relative(parts: Iterable[Norms]) -> float:
    """|rounded - values| / |values| of all parts; 0 for zeros."""
    lost, norm = (math.fsum(column) for column in zip(*parts, strict=True))
    return math.sqrt(lost / norm) if norm else 0.0
