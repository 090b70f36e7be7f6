"""Timesteps of rectified flow. Importing this needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Time = TypeVar("Time", float, "Tensor")


def shifted(u: Time, shift: float) -> Time:
    """t = shift * u / (1 + (shift - 1) * u): 1 stays 1 and 0 stays 0."""
    return shift * u / (1 + (shift - 1) * u)


def timesteps(count: int, shift: float) -> Tensor:
    """t from 1 to 0: float32 [count], `shifted` from `linspace(1, 0, count)`."""
    import torch

    return shifted(torch.linspace(1, 0, count), shift)
