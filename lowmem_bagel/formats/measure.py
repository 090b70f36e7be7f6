"""Errors of quantised weights against the weights they came from, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Dequantize, QuantMatmul, row_blocks


def weight_error(weight: Tensor, stored: Tensor, scales: Tensor, dequantize: Dequantize) -> float:
    """|dequantised - weight| / |weight|, Frobenius norms; weight [out, in] of any float dtype. 0 for zeros."""
    return _relative_l2(
        (dequantize(stored[rows], scales[rows], torch.float32), weight[rows].float())
        for rows in row_blocks(*weight.shape)
    )


def output_error(weight: Tensor, stored: Tensor, scales: Tensor, matmul: QuantMatmul, x: Tensor) -> float:
    """|matmul(x) - x W.T| / |x W.T| for activations x [tokens, in], both in float32. 0 where the product is zero."""
    wide = x.float()
    return _relative_l2(
        (matmul.matmul(wide, stored[rows], scales[rows], None), F.linear(wide, weight[rows].float()))
        for rows in row_blocks(*weight.shape)
    )


def _relative_l2(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    difference = reference = 0.0
    for approximate, exact in pairs:
        difference += float((approximate - exact).square().sum(dtype=torch.float64))
        reference += float(exact.square().sum(dtype=torch.float64))
    return float((difference / reference) ** 0.5) if reference else 0.0
