"""INT8: symmetric per output row, `weight` int8 [out, in] and `scale` float32 [out] = absmax / 127.

The values are round(w / scale), half to even, all in float32 whatever the dtype of w. They equal optimum-quanto's
qint8 of the weight in float32. (From a bfloat16 weight quanto rounds its scale to bfloat16; that costs a tenth more
error and is not what is stored.) A row of zeros has the scale 0 and stays zero.

Activations are quantized likewise, token by token, for the W8A8 arithmetic of `ops.int8`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConversionError
from ...ops.int8 import int_mm, quantize_rows
from ...ops.linear import Product, Weights
from ..base import BLOCK_VALUES, dequantize_blocks, row_blocks
from ..measure import weight_error
from ..rows import Empty, by_loop, encode_rows, roomy

NOT_FINITE = "holds an infinite or NaN value, which int8 cannot represent; take other weights"
CPU_WEIGHT_VALUES = 1 << 22
"""Values of a weight that are converted at a time on a CPU, to be multiplied while they are in its cache."""
CPU_PRODUCT_VALUES = 1 << 21
"""Values of a block of tokens on a CPU: its copies come from memory that the process has touched already. 4096 tokens
by 3584x3584 take half as long as in blocks of `BLOCK_VALUES`; much smaller blocks repack the weight too often."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix [out, in] of any float dtype -> (int8 [out, in], float32 scale [out]).

    Needs little memory besides its result: the float32 copies are made in blocks of rows.

    Raises:
        ConversionError: a value is infinite or NaN. The caller adds the tensor's name.
    """
    assert weight.dim() == 2, "only matrices are quantised"
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for rows in row_blocks(*weight.shape):
        values[rows], row_scale = quantize_rows(weight[rows])
        scale[rows] = row_scale.squeeze(-1)
    if not bool(torch.isfinite(scale).all()):
        raise ConversionError(NOT_FINITE)
    return values, scale


def encode(weight: Tensor, empty: Empty = roomy) -> tuple[Tensor, Tensor, float]:
    """`quantize`, and |decoded - weight| / |weight|: in one pass on all cores over a weight on the CPU.

    Raises:
        ConversionError: as quantize.
    """
    assert weight.dim() == 2, "only matrices are quantised"
    if not by_loop(weight):
        values, scale = quantize(weight)
        return values, scale, weight_error(weight, values, scale, dequantize)
    from . import loops

    values, scale = empty(weight.shape, torch.int8), empty(weight.shape[:1], torch.float32)
    error = encode_rows(loops.encode, weight, (values, scale))
    if error is None:
        raise ConversionError(NOT_FINITE)
    return values, scale, error


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [out, in] * scale [out], multiplied in float32 and rounded once to `dtype`."""
    dense = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in dequantize_blocks(dense):
        dense[rows] = weight[rows].float().mul_(scale[rows, None])
    return dense


class IntMm(Product):
    """The W8A8 arithmetic through `torch._int_mm`, a block of tokens at a time.

    Blocks bound the int32 and float32 intermediates, which are six times larger than a bfloat16 result;
    `block_values` None takes what suits the device.
    """

    def __init__(self, block_values: int | None = None) -> None:
        self.block_values = block_values

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        weight, scales, bias = weights
        assert scales is not None
        tokens = x.reshape(-1, x.shape[-1])
        out = torch.empty(tokens.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        block = self.block_values or (CPU_PRODUCT_VALUES if x.device.type == "cpu" else BLOCK_VALUES)
        for rows in row_blocks(tokens.shape[0], max(tokens.shape[1], out.shape[1]), block):
            quantized, token_scale = quantize_rows(tokens[rows])
            y = int_mm(quantized, weight).float()
            y.mul_(scales).mul_(token_scale)
            out[rows] = y if bias is None else y.add_(bias)
        return out.view(*x.shape[:-1], weight.shape[0])


class WeightOnly(Product):
    """Weights are converted to the activations' dtype, in which integers are exact, and the scale meets the product.

    That rounds no weight and moves less memory than dequantising does.
    """

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        weight, scales, bias = weights
        assert scales is not None
        # Whole where it is not kept in a cache: parts would have to be put together, which takes memory.
        block = CPU_WEIGHT_VALUES if x.device.type == "cpu" else weight.numel()
        cuts = list(row_blocks(weight.shape[0], weight.shape[1], block))
        tokens = x.reshape(-1, x.shape[-1])
        # One for all parts: memory new to the process costs more than filling it.
        room = torch.empty(cuts[0].stop, weight.shape[1], dtype=x.dtype, device=x.device)

        def product(rows: slice) -> Tensor:
            converted = room[: rows.stop - rows.start].copy_(weight[rows])
            y = F.linear(tokens, converted)
            scaled = y.float().mul_(scales[rows])
            return (scaled if bias is None else scaled.add_(bias[rows])).to(y.dtype)

        parts = [product(rows) for rows in cuts]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).view(*x.shape[:-1], len(weight))
