"""Encoding a weight by a compiled loop, on all cores: one pass that makes the stored tensors and measures them.

Taking a weight through memory once, and not a dozen times, is what decides the speed of a conversion on few cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .base import row_blocks
from .blocks import map_blocks

Empty = Callable[[Sequence[int], torch.dtype], Tensor]
"""(shape, dtype) -> an uninitialised CPU tensor."""
TASK_VALUES = 1 << 20
"""Values that one task takes: many enough that starting it costs nothing, and that every core gets some."""


def by_loop(weight: Tensor) -> bool:
    """Whether the compiled loops take this weight; the others are for PyTorch's operations."""
    return weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)


def encode_rows(loop: Callable[..., Any], weight: Tensor, out: Sequence[Tensor], *constants: object) -> float | None:
    """Fill `out`, tensors whose rows are the weight's, by `loop(bits, *constants, *out, sums)`.

    weight: bf16, fp16 or float32 [rows, width] on the CPU. bits: uint16 of bf16, else uint32 of float32.

    Returns:
        |decoded - weight| / |weight| in Frobenius norms, of float32 norms of rows summed in float64, and 0 for zeros;
        None where the weight is not finite.
    """
    arrays = [tensor.numpy() for tensor in out]

    def task(rows: slice) -> tuple[bool, NDArray[np.float64]]:
        sums = np.zeros(2)
        return loop(float_bits(weight[rows]), *constants, *(array[rows] for array in arrays), sums), sums

    parts = map_blocks(task, row_blocks(len(weight), weight.shape[1], TASK_VALUES))
    if not all(finite for finite, _ in parts):
        return None
    lost, norm = (math.fsum(sums[k] for _, sums in parts) for k in (0, 1))
    return math.sqrt(lost / norm) if norm else 0.0


def all_finite(tensor: Tensor) -> bool:
    """Whether a CPU tensor of any float dtype holds neither NaN nor an infinity."""
    flat = tensor.reshape(-1)
    return all(map_blocks(lambda piece: _finite(flat[piece]), row_blocks(flat.numel(), 1, TASK_VALUES)))


def _finite(values: Tensor) -> bool:
    if values.device.type != "cpu" or values.dtype != torch.bfloat16:
        return bool(torch.isfinite(values).all())
    from .compiled import BF16_INFINITY, bf16_peak

    return bool(bf16_peak(bf16_bits(values)) < BF16_INFINITY)


def roomy(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor. NumPy asks for large pages where torch does not: filling new memory is 6 times as
    quick."""
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(*shape)


def float_bits(weight: Tensor) -> NDArray[np.uint16] | NDArray[np.uint32]:
    """The bit patterns of a CPU tensor: of bf16 as it is, of others as float32."""
    if weight.dtype == torch.bfloat16:
        return bf16_bits(weight)
    bits: NDArray[np.uint32] = weight.detach().float().contiguous().view(torch.int32).numpy().view(np.uint32)
    return bits


def bf16_bits(tensor: Tensor) -> NDArray[np.uint16]:
    """The bit patterns of a bf16 CPU tensor, of its shape; shares its memory where it is contiguous."""
    assert tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu", (tensor.dtype, tensor.device)
    bits: NDArray[np.uint16] = tensor.detach().contiguous().view(torch.int16).numpy().view(np.uint16)
    return bits
