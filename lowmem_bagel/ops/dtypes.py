"""The dtypes around the arithmetic, and what keeps fp16's range."""

from __future__ import annotations

import torch

VALUE_SCALE = 1 / 16
"""Of attention's values in fp16 arithmetic: they stay finite up to 1e6, and what is lost below is 1e-6 of one."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what surrounds the decoder's linears: float32 where the arithmetic's range is fp16's."""
    return torch.float32 if dtype == torch.float16 else dtype
