"""Row-wise quantisation and the measuring of its error in one pass, in blocks that stay in the CPU's cache.

Taking a tensor through memory once, and not a dozen times, is what decides the speed of a conversion on few cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_bagel.formats.base import Dequantize


def quantize_rows(
    weight: Tensor, quantize: Callable[[Tensor], tuple[Tensor, Tensor]], dequantize: Dequantize
) -> tuple[Tensor, Tensor, float]:
    """Quantise a matrix [out, in] by a codec that treats every row by itself, on all cores.

    Returns:
        the codec's two tensors for the whole matrix, and |dequantised - weight| / |weight| in Frobenius norms, summed
        in float64 over blocks whose norms are float32; 0 for a matrix of zeros.
    """
    import torch

    from lowmem_bagel.formats.base import CPU_BLOCK_VALUES, row_blocks
    from lowmem_bagel.formats.blocks import map_blocks

    first_values, first_scales = quantize(weight[:1])
    values = torch.empty(len(weight), *first_values.shape[1:], dtype=first_values.dtype)
    scales = torch.empty(len(weight), *first_scales.shape[1:], dtype=first_scales.dtype)

    def quantize_block(rows: slice) -> tuple[float, float]:
        """The squared norms of what the block loses and of the block."""
        values[rows], scales[rows] = quantize(weight[rows])
        exact = weight[rows].float()
        lost = torch.linalg.vector_norm(dequantize(values[rows], scales[rows], torch.float32) - exact)
        return float(lost) ** 2, float(torch.linalg.vector_norm(exact)) ** 2

    norms = map_blocks(quantize_block, row_blocks(len(weight), weight.shape[1], CPU_BLOCK_VALUES))
    lost, norm = (math.fsum(column) for column in zip(*norms, strict=True))
    return values, scales, math.sqrt(lost / norm) if norm else 0.0
