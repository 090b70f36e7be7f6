"""The W8A8 arithmetic, in PyTorch's operations: the reference of every kernel with int8 activations.

    absmax_t = max |x_t|                                            per token t, float32
    s_t      = absmax_t / 127                                       float32 division
    q_t      = clamp(round_half_to_even(x_t / s_t), -127, 127)      int8; 0 for a token of zeros
    acc      = q @ weight.T                                         int32, exact
    y        = acc * scale_n * s_t + bias                           float32, left to right
    result   = y rounded to x's dtype

A token with an infinity or a NaN gives a row without finite values, never a plausible one.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_IN_FEATURES = (2**31 - 1) // 127**2
"""Longest row whose int32 sum cannot overflow."""
PADDED_TOKENS = 24
"""Rows that a product of up to 16 tokens is padded to."""
FLOAT_ROWS = 512
"""Rows of a weight that are converted at a time where int8 values are multiplied as floats."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] of any float dtype -> (int8 [..., K], float32 scale [..., 1]), by the arithmetic of this file's head."""
    wide = x.float()
    absmax = wide.abs().amax(-1, keepdim=True)
    # Two tensors are divided, because CUDA multiplies by a rounded reciprocal when the divisor is a Python number.
    scale = absmax / torch.full_like(absmax, 127)
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    # The clamp matters only where the scale is subnormal and so has few bits.
    return (wide / divisor).round_().clamp_(-127, 127).to(torch.int8), scale


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] int8 @ b [N, K].T int8 -> int32 [M, N], exact.

    On CUDA `torch._int_mm` wants more than 16 rows, and K and N in multiples of 8: what is missing is padded with
    zeros, on the CPU too, so that one path serves and is tested everywhere. A processor on which it is not exact
    multiplies in float64.
    """
    (m, k), n = a.shape, b.shape[0]
    assert k <= MAX_IN_FEATURES, "the int32 sum could overflow"
    if a.device.type == "cpu" and pairs_overflow():
        return _int_mm_by_floats(a, b)
    if -k % 8 or -n % 8:
        b = F.pad(b, (0, -k % 8, 0, -n % 8))
    if m <= 16 or -k % 8:
        a = F.pad(a, (0, -k % 8, 0, PADDED_TOKENS - m if m <= 16 else 0))
    return torch._int_mm(a, b.t())[:m, :n]


@cache
def pairs_overflow() -> bool:
    """Whether `torch._int_mm` is wrong on this processor: without VNNI oneDNN adds each two products in 16 bits."""
    largest = torch.full((PADDED_TOKENS, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(largest, largest.t()) != 64 * 127**2).any())


def _int_mm_by_floats(a: Tensor, b: Tensor) -> Tensor:
    """As `int_mm`; the weight is converted a few rows at a time."""
    wide = a.double()
    return torch.cat([(wide @ rows.double().t()).to(torch.int32) for rows in b.split(FLOAT_ROWS)], dim=1)
