"""NF4: bitsandbytes' 4-bit NormalFloat in blocks of 64 consecutive values of a row, without nested scales.

`weight` uint8 [out, in / 2]: byte i of a row holds value 2i in its high four bits and value 2i + 1 in its low four.
`absmax` float32 [out, in / 64]. A value is CODEBOOK[its four bits] * absmax of its block. Rows must be multiples of
64 long, so that no block crosses rows and fused linears are plain concatenations; other tensors stay unquantised.
These are the bytes that bitsandbytes makes and reads, only shaped as a matrix; its quantiser's arithmetic is

    inverse = 1 / max(absmax, 1e-38), code = number of BOUNDS below clamp(w * inverse, -1, 1)      all in float32
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...errors import ConversionError
from ..base import dequantize_blocks, row_blocks
from ..measure import weight_error
from ..rows import Empty, by_loop, encode_rows, roomy
from .levels import BLOCK, BOUNDS, CODEBOOK, SMALLEST_ABSMAX

NOT_FINITE = "holds an infinite or NaN value, which NF4 cannot represent; take other weights"


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a matrix [out, in] of any float dtype -> (uint8 [out, in / 2], absmax float32 [out, in / 64]).

    On any device, in blocks of rows, which bounds the float32 copies and does not change the result.

    Raises:
        ConversionError: rows are not a multiple of 64 long, or a value is infinite or NaN. The caller adds the name.
    """
    stored, scales = _shapes(weight)
    packed = torch.empty(stored, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(scales, dtype=torch.float32, device=weight.device)
    bounds = torch.tensor(BOUNDS, dtype=torch.float32, device=weight.device)
    for rows in row_blocks(*weight.shape):
        values = weight[rows].float().reshape(-1, BLOCK)
        size = values.abs().amax(1)
        absmax[rows] = size.view(-1, absmax.shape[1])
        inverse = 1.0 / size.clamp(min=SMALLEST_ABSMAX)
        codes = torch.bucketize((values * inverse[:, None]).clamp_(-1, 1), bounds, out_int32=True).to(torch.uint8)
        packed[rows] = (codes[:, ::2] << 4 | codes[:, 1::2]).view(-1, packed.shape[1])
    if not bool(torch.isfinite(absmax).all()):
        raise ConversionError(NOT_FINITE)
    return packed, absmax


def encode(weight: Tensor, empty: Empty = roomy) -> tuple[Tensor, Tensor, float]:
    """`quantize`, and |decoded - weight| / |weight|: in one pass on all cores over a weight on the CPU.

    Raises:
        ConversionError: as quantize.
    """
    stored, scales = _shapes(weight)
    if not by_loop(weight):
        packed, absmax = quantize(weight)
        return packed, absmax, weight_error(weight, packed, absmax, dequantize)
    from . import loops

    packed, absmax = empty(stored, torch.uint8), empty(scales, torch.float32)
    error = encode_rows(loops.encode, weight, (packed, absmax), np.array(CODEBOOK, np.float32))
    if error is None:
        raise ConversionError(NOT_FINITE)
    return packed, absmax, error


def dequantize(weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored tensors -> dense [out, in], multiplied in float32 and rounded once; bit-equal to bitsandbytes'.

    absmax may have a row for several of the weight's, whose blocks go on from one to the next.
    """
    shape, weight = weight.shape, weight.reshape(len(absmax), -1)
    out_features, half = weight.shape
    codebook = torch.tensor(CODEBOOK, dtype=torch.float32, device=weight.device)
    # One look-up gives both values of a byte: [256, 2], first value first.
    pairs = torch.stack((codebook.repeat_interleave(16), codebook.repeat(16)), dim=1)
    dense = torch.empty(out_features, 2 * half, dtype=dtype, device=weight.device)
    for rows in dequantize_blocks(dense):
        values = pairs.index_select(0, weight[rows].flatten().int()).view(-1, BLOCK)
        dense[rows] = values.mul_(absmax[rows].view(-1, 1)).view(-1, 2 * half)
    return dense.view(shape[0], 2 * shape[1])


def _shapes(weight: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of what `weight` is stored in."""
    assert weight.dim() == 2, "only matrices are quantised"
    out_features, in_features = weight.shape
    if in_features % BLOCK:
        raise ConversionError(f"has rows of {in_features}, not a multiple of {BLOCK}: NF4 cannot hold it; leave it out")
    return (out_features, in_features // 2), (out_features, in_features // BLOCK)
