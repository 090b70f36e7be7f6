"""The compiled loop that makes fp16 of bf16 and measures what is lost. Importing this file imports numba."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, no-any-return"

from __future__ import annotations

import numpy as np

from ..compiled import BF16_ABSOLUTE, BF16_INFINITY, bf16_peak, compiled, squares

PIECE = 4096
"""Values whose float32 copies stay in a core's first cache."""
TOO_LARGE = np.uint16(0x4780)
"""The bf16 pattern of 65536, the first beyond float16's range."""
NORMAL = np.uint32(0x38800000)
"""The float32 pattern of 2^-14, from where on float16 has all of bf16's bits."""
HALF, HALF_PATTERN = np.float32(0.5), np.uint32(0x3F000000)
"""Whose unit in the last place is 2^-24, float16's smallest step: adding it rounds to whole steps, half to even."""
SIGN, U16, U13, BIAS = np.uint32(0x8000), np.uint32(16), np.uint32(13), np.uint32(112 << 10)
U0, ZERO, SMALLEST, SMALLEST_NORMAL = np.uint32(0), np.float32(0), np.float32(2.0**-149), np.float32(2.0**-14)


@compiled
def _largest(patterns):
    """Of float32 patterns of numbers that are not negative, which are ordered as the numbers are."""
    largest = np.uint32(0)
    for i in range(patterns.size):
        largest = max(largest, patterns[i])
    return largest


@compiled
def convert(bits, half, counts, peaks, sums):
    """Convert values piece by piece, each while it is in the cache.

    bits: uint16 [n], of bf16. half: uint16 [n], of float16, out; may be the same memory. counts: int64 [2], to which
    the values below the normal range and those that vanish are added. peaks: float32 [3], raised to the largest
    magnitude, relative loss and absolute loss. sums: float64 [2], to which the squared norms of what is lost and of the
    values are added. Returns 0, or 1 where a value is not finite, or 2 where one is too large: peaks[0] is that one.
    """
    size, stepped = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    lost, relative = np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    patterns, steps, tops = size.view(np.uint32), stepped.view(np.uint32), peaks.view(np.uint32)
    signs, narrow = np.empty(PIECE, np.uint32), np.empty(PIECE, np.uint32)
    for first in range(0, bits.size, PIECE):
        last = min(first + PIECE, bits.size)
        n = last - first
        piece, target = bits[first:last], half[first:last]
        largest = bf16_peak(piece)
        if largest >= BF16_INFINITY:
            return 1
        tops[0] = max(tops[0], np.uint32(largest) << U16)
        if largest >= TOO_LARGE:
            return 2
        for i in range(n):
            patterns[i] = np.uint32(piece[i] & BF16_ABSOLUTE) << U16
            signs[i] = np.uint32(piece[i]) & SIGN
        for i in range(n):
            stepped[i] = size[i] + HALF
            loss = abs(stepped[i] - HALF - size[i])
            lost[i] = loss if size[i] < SMALLEST_NORMAL else ZERO
            relative[i] = lost[i] / max(size[i], SMALLEST)
        below, vanished = U0, U0
        for i in range(n):
            step, kept = np.uint32(steps[i] - HALF_PATTERN), np.uint32(np.uint32(patterns[i] >> U13) - BIAS)
            narrow[i] = step if patterns[i] < NORMAL else kept
            below = np.uint32(below + np.uint32((patterns[i] != U0) & (patterns[i] < NORMAL)))
            vanished = np.uint32(vanished + np.uint32((patterns[i] != U0) & (narrow[i] == U0)))
        for i in range(n):
            target[i] = np.uint16(signs[i] | narrow[i])
        counts[0] += below
        counts[1] += vanished
        tops[1] = max(tops[1], _largest(relative[:n].view(np.uint32)))
        tops[2] = max(tops[2], _largest(lost[:n].view(np.uint32)))
        sums[0] += squares(lost[:n])
        sums[1] += squares(size[:n])
    return 0
