"""Timesteps of rectified flow."""

from __future__ import annotations

import torch
from torch import Tensor


def timesteps(count: int, shift: float) -> Tensor:
    """t from 1 to 0: float32 [count], `t = shift * u / (1 + (shift - 1) * u)` for `u = linspace(1, 0, count)`."""
    u = torch.linspace(1, 0, count)
    return shift * u / (1 + (shift - 1) * u)
