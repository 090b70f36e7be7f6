"""The compiled loop that quantises a weight to INT8. Importing this file imports numba."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, no-any-return"

from __future__ import annotations

import numpy as np

from ..compiled import INFINITY, compiled, peak, squares, widen

ZERO, ONE, LARGEST = np.float32(0), np.float32(1), np.float32(127)


@compiled
def encode(bits, values, scales, sums):
    """Quantise rows by the arithmetic of `ops.int8`, each while it is in the cache, and measure what is lost.

    bits: uint16 [rows, width] of bf16, or uint32 of float32. values: int8 [rows, width] and scales: float32 [rows],
    out. sums: float64 [2], to which the squared norms of what is lost and of the weight are added.
    Returns whether all values are finite; what is written is of no use otherwise.
    """
    width = bits.shape[1]
    wide, lost = np.empty(width, np.float32), np.empty(width, np.float32)
    patterns, absmax = wide.view(np.uint32), np.empty(1, np.float32)
    for r in range(bits.shape[0]):
        widen(bits[r], patterns)
        largest = peak(patterns)
        if largest >= INFINITY:
            return False
        absmax.view(np.uint32)[0] = largest
        scale = absmax[0] / LARGEST
        divisor = scale if scale > ZERO else ONE
        row = values[r]
        for i in range(width):
            # The bounds matter only where the scale is subnormal and so has few bits.
            value = min(max(np.rint(wide[i] / divisor), -LARGEST), LARGEST)
            row[i] = np.int8(np.int32(value))
            lost[i] = value * scale - wide[i]
        scales[r] = scale
        sums[0] += squares(lost)
        sums[1] += squares(wide)
    return True
