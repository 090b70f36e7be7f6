"""fp16 weights with a report of what the narrower range cost.

bfloat16 has 8 significant bits and float16 has 11, so a bfloat16 weight inside float16's normal range
[6.1e-5, 65504] keeps its value exactly. Above, the conversion is refused; below, float16 has fewer bits and finally
none, and the loss is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import ConversionError
from ..base import BLOCK_VALUES, row_blocks
from ..blocks import map_blocks
from ..rows import TASK_VALUES, bf16_bits

MAX = 65504.0
SMALLEST_NORMAL = 2.0**-14
NOT_FINITE = "holds an infinite or NaN value; take other weights"
CONVERTED_AT_ONCE = 1 << 15
"""Values of a block that PyTorch converts on the CPU: its half dozen float32 copies stay in a core's own cache."""


@dataclass(frozen=True)
class RangeReport:
    """What float16 did to a tensor. The losses are 0 where every value kept its bits."""

    largest: float
    """Largest magnitude in the source."""
    below_normal: int
    """Non-zero values under float16's normal range, which have fewer bits there."""
    vanished: int
    """Non-zero values that became zero."""
    largest_relative_loss: float
    """max |fp16(w) - w| / |w| over the non-zero values; 1 where a value vanished."""
    largest_absolute_loss: float
    relative_l2: float
    """|fp16(w) - w| / |w| over the whole tensor."""


def convert(tensor: Tensor, out: Tensor | None = None) -> tuple[Tensor, RangeReport]:
    """A tensor of any shape and float dtype -> (float16, report). Float32 copies are made in blocks.

    out: float16 of the tensor's shape, to be filled; may be the tensor's own memory where that has 16 bits a value.

    Raises:
        ConversionError: a value is infinite, NaN, or beyond 65504. The caller adds the tensor's name.
    """
    half = torch.empty(tensor.shape, dtype=torch.float16, device=tensor.device) if out is None else out
    source, target = tensor.reshape(-1), half.view(-1)
    on_cpu = tensor.device.type == "cpu"
    work, size = (
        (_convert_by_loop, TASK_VALUES)
        if on_cpu and tensor.dtype == torch.bfloat16
        else (_convert_block, CONVERTED_AT_ONCE)
    )
    blocks = row_blocks(source.numel(), 1, size if on_cpu else BLOCK_VALUES)
    parts = map_blocks(lambda block: work(source[block], target[block]), blocks, threads=None if on_cpu else 1)
    squares, lost = (math.fsum(getattr(part, name) for part in parts) for name in ("squares", "lost_squares"))
    report = RangeReport(
        largest=max((part.largest for part in parts), default=0.0),
        below_normal=sum(part.below_normal for part in parts),
        vanished=sum(part.vanished for part in parts),
        largest_relative_loss=max((part.relative for part in parts), default=0.0),
        largest_absolute_loss=max((part.absolute for part in parts), default=0.0),
        relative_l2=math.sqrt(lost / squares) if squares else 0.0,
    )
    return half, report


@dataclass(frozen=True)
class _Block:
    """What one block adds to the report."""

    largest: float
    below_normal: int
    vanished: int
    relative: float
    absolute: float
    squares: float
    lost_squares: float


def _convert_by_loop(source: Tensor, target: Tensor) -> _Block:
    from . import loops

    counts, peaks, sums = np.zeros(2, np.int64), np.zeros(3, np.float32), np.zeros(2)
    half = target.view(torch.int16).numpy().view(np.uint16)
    refused = loops.convert(bf16_bits(source), half, counts, peaks, sums)
    if refused:
        raise ConversionError(NOT_FINITE if refused == 1 else _too_large(float(peaks[0])))
    largest, relative, absolute = map(float, peaks)
    return _Block(largest, int(counts[0]), int(counts[1]), relative, absolute, float(sums[1]), float(sums[0]))


def _too_large(peak: float) -> str:
    return f"reaches {peak:.6g}, beyond float16's {MAX:.0f}: keep it bf16, or convert to int8"


def _convert_block(source: Tensor, target: Tensor) -> _Block:
    wide = source.double() if source.dtype == torch.float64 else source.float()
    narrow = wide.to(torch.float16)
    target.copy_(narrow)
    magnitude = wide.abs()
    peak = float(magnitude.max())
    if not math.isfinite(peak):
        raise ConversionError(NOT_FINITE)
    if bool(narrow.isinf().any()):
        raise ConversionError(_too_large(peak))
    squares = float(magnitude.square().sum(dtype=torch.float64))
    nonzero = magnitude > 0
    below = int((nonzero & (magnitude < SMALLEST_NORMAL)).sum())
    loss = (narrow.to(wide.dtype) - wide).abs_()
    absolute = float(loss.max())
    if not absolute:
        return _Block(peak, below, 0, 0.0, 0.0, squares, 0.0)
    return _Block(
        largest=peak,
        below_normal=below,
        vanished=int((nonzero & (narrow == 0)).sum()),
        relative=float((loss / torch.where(nonzero, magnitude, torch.ones_like(magnitude))).max()),
        absolute=absolute,
        squares=squares,
        lost_squares=float(loss.square().sum(dtype=torch.float64)),
    )
