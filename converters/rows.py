"""Row-wise quantisation and the measuring of its error in one pass, in blocks that stay in the CPU's cache.

Taking a tensor through memory once, and not a dozen times, is what decides the speed of a conversion on few cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_bagel.quant.linear import Dequantize

BLOCK_VALUES = 1 << 18
"""1 MiB in float32."""


def quantize_rows(
    weight: Tensor, quantize: Callable[[Tensor], tuple[Tensor, Tensor]], dequantize: Dequantize
) -> tuple[Tensor, Tensor, float]:
    """Quantise a matrix [out, in] by a codec that treats every row by itself.

    Returns:
        the codec's two tensors for the whole matrix, and |dequantised - weight| / |weight| in Frobenius norms, summed
        in float64 over blocks whose norms are float32; 0 for a matrix of zeros.
    """
    import torch

    values: Tensor | None = None
    scales: Tensor | None = None
    lost = norm = 0.0
    step = max(1, BLOCK_VALUES // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        block = weight[rows]
        block_values, block_scales = quantize(block)
        if values is None or scales is None:
            values = torch.empty(len(weight), *block_values.shape[1:], dtype=block_values.dtype)
            scales = torch.empty(len(weight), *block_scales.shape[1:], dtype=block_scales.dtype)
        values[rows], scales[rows] = block_values, block_scales
        exact = block.float()
        norm += float(torch.linalg.vector_norm(exact)) ** 2
        lost += float(torch.linalg.vector_norm(dequantize(block_values, block_scales, torch.float32) - exact)) ** 2
    assert values is not None and scales is not None, "a matrix has rows"
    return values, scales, math.sqrt(lost / norm) if norm else 0.0
