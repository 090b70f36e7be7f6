"""Random inputs, distances, and poisoned memory for tests of arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowmem_bagel.ops.errors import relative_l2 as relative_l2

FLOATS = [torch.bfloat16, torch.float16, torch.float32]

HALF_STEP = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-25}
"""What the relative L2 error of rounding many numbers once to the dtype stays below; one number may have twice that."""


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every `torch.empty` holds NaN or the largest integer, so that a value never written is seen."""
    quickly_deterministic(True)
    yield
    quickly_deterministic(False)


def quickly_deterministic(mode: bool, *, warn_only: bool = False) -> None:
    """As `torch.use_deterministic_algorithms`, which imports PyTorch's compiler to tell it, for longer than most files'
    tests take."""
    torch._C._set_deterministic_algorithms(mode, warn_only=warn_only)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    """On the processor, also where another device is the default: the same numbers everywhere."""
    drawn = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return (drawn * std).to(dtype)
