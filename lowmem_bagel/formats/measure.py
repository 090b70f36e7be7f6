"""Errors of quantised weights against the weights they came from, a block of rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.errors import relative_l2_of
from ..ops.linear import Product, Weights
from .base import Dequantize, row_blocks


def weight_error(weight: Tensor, stored: Tensor, scales: Tensor, dequantize: Dequantize) -> float:
    """|dequantised - weight| / |weight|, Frobenius norms; weight [out, in] of any float dtype. 0 for zeros."""
    return relative_l2_of(
        (dequantize(stored[rows], scales[rows], torch.float32), weight[rows].float())
        for rows in row_blocks(*weight.shape)
    )


def output_error(weight: Tensor, stored: Tensor, scales: Tensor, product: Product, x: Tensor) -> float:
    """|product(x) - x W.T| / |x W.T| for activations x [tokens, in], both in float32. 0 where both are zero."""
    wide = x.float()
    return relative_l2_of(
        (product.product(wide, Weights(stored[rows], scales[rows])), F.linear(wide, weight[rows].float()))
        for rows in row_blocks(*weight.shape)
    )
