"""NF4: bitsandbytes' 4-bit NormalFloat in blocks of 64 consecutive values of a row, without nested scales.

`weight` uint8 [out, in / 2]: byte i of a row holds value 2i in its high four bits and value 2i + 1 in its low four.
`absmax` float32 [out, in / 64]. A value is CODEBOOK[its four bits] * absmax of its block. Rows must be multiples of
64 long, so that no block crosses rows and fused linears are plain concatenations; other tensors stay unquantised.
These are the bytes bitsandbytes itself makes and reads, only shaped as a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ConversionError
from ..base import dequantize_blocks, row_blocks
from ..extras import require

BLOCK = 64

CODEBOOK = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 levels of NormalFloat (QLoRA, arXiv 2305.14314, appendix E), as float32 values."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix [out, in] with bitsandbytes -> (uint8 [out, in / 2], absmax float32 [out, in / 64]).

    Works in blocks of rows, which bounds the quantiser's float32 copies and does not change its result.

    Raises:
        ConversionError: rows are not a multiple of 64 long, or a value is infinite or NaN. The caller adds the name.
        MissingExtraError: bitsandbytes is not installed.
    """
    assert weight.dim() == 2, "only matrices are quantised"
    out_features, in_features = weight.shape
    if in_features % BLOCK:
        raise ConversionError(f"has rows of {in_features}, not a multiple of {BLOCK}: NF4 cannot hold it; leave it out")
    functional = require("bitsandbytes", "bitsandbytes", "bitsandbytes").functional
    packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(out_features, in_features // BLOCK, dtype=torch.float32, device=weight.device)
    for rows in row_blocks(*weight.shape):
        values = weight[rows].float().contiguous()
        block, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
        packed[rows] = block.view(-1, in_features // 2)
        absmax[rows] = state.absmax.view(-1, in_features // BLOCK)
        # The sum is quick, and finite unless a value is not or many are huge; then each is looked at.
        if not bool(torch.isfinite(values.sum()) or torch.isfinite(values).all()):
            raise ConversionError("holds an infinite or NaN value, which NF4 cannot represent; download it again")
    return packed, absmax


def dequantize(weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored tensors -> dense [out, in], multiplied in float32 and rounded once; bit-equal to bitsandbytes'."""
    out_features, half = weight.shape
    codebook = torch.tensor(CODEBOOK, dtype=torch.float32, device=weight.device)
    # One look-up gives both values of a byte: [256, 2], first value first.
    pairs = torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), dim=1)
    dense = torch.empty(out_features, 2 * half, dtype=dtype, device=weight.device)
    for rows in dequantize_blocks(dense):
        values = pairs.index_select(0, weight[rows].flatten().int()).view(-1, BLOCK)
        dense[rows] = values.mul_(absmax[rows].view(-1, 1)).view(-1, 2 * half)
    return dense
