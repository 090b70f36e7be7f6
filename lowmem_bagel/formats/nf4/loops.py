"""The compiled loop that quantises a weight to NF4. Importing this file imports numba."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, no-any-return"

from __future__ import annotations

import numpy as np

from ..compiled import INFINITY, compiled, peak, squares, widen
from .levels import BLOCK, BOUNDS, SMALLEST_ABSMAX

ONE, SMALLEST = np.float32(1), np.float32(SMALLEST_ABSMAX)
B0, B1, B2, B3, B4, B5, B6, B7, B8, B9, B10, B11, B12, B13, B14 = map(np.float32, BOUNDS)


@compiled
def _code(value):
    """The number of bounds below a value. Counted, not searched: so the compiler does many values at once."""
    low = np.int32(value > B0) + np.int32(value > B1) + np.int32(value > B2) + np.int32(value > B3)
    low += np.int32(value > B4) + np.int32(value > B5) + np.int32(value > B6) + np.int32(value > B7)
    high = np.int32(value > B8) + np.int32(value > B9) + np.int32(value > B10) + np.int32(value > B11)
    return low + high + np.int32(value > B12) + np.int32(value > B13) + np.int32(value > B14)


@compiled
def encode(bits, codebook, packed, absmax, sums):
    """Quantise rows by the arithmetic of the codec, each while it is in the cache, and measure what is lost.

    bits: uint16 [rows, width] of bf16, or uint32 of float32; width a multiple of 64. codebook: float32 [16]. packed:
    uint8 [rows, width / 2] and absmax: float32 [rows, width / 64], out. sums: float64 [2], to which the squared norms
    of what is lost and of the weight are added. Returns whether all values are finite; what is written is of no use
    otherwise.
    """
    width = bits.shape[1]
    wide, lost, codes = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.int32)
    patterns, peaks = wide.view(np.uint32), absmax.view(np.uint32)
    for r in range(bits.shape[0]):
        widen(bits[r], patterns)
        for b in range(width // BLOCK):
            first, last = b * BLOCK, (b + 1) * BLOCK
            largest = peak(patterns[first:last])
            if largest >= INFINITY:
                return False
            peaks[r, b] = largest
            size = absmax[r, b]
            inverse = ONE / max(size, SMALLEST)
            values, code, loss = wide[first:last], codes[first:last], lost[first:last]
            for i in range(BLOCK):
                code[i] = _code(min(max(values[i] * inverse, -ONE), ONE))
            for i in range(BLOCK):
                loss[i] = codebook[code[i]] * size - values[i]
        row = packed[r]
        for i in range(width // 2):
            row[i] = np.uint8(codes[2 * i] << 4 | codes[2 * i + 1])
        sums[0] += squares(lost)
        sums[1] += squares(wide)
    return True
