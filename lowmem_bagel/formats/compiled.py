"""Loops that numba compiles. Importing this file imports numba; only the codecs do, when they are used.

The loops hold no lock, so codecs run them on plain threads: numba's own parallel loops abort the process when two
threads enter them. Types are those of the arguments.
"""

# Annotating every local would say nothing more.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, no-any-return"

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

ABSOLUTE, INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
BF16_ABSOLUTE, BF16_INFINITY = np.uint16(0x7FFF), np.uint16(0x7F80)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function`, compiled on its first call; kept on disk where a folder for that can be written."""
    try:
        return numba.njit(nogil=True, cache=True, **options)(function)
    except RuntimeError as error:  # neither the package's folder nor the user's cache folder can be written
        logging.getLogger(__name__).info("compiled code is not kept on disk: %s", error)
        return numba.njit(nogil=True, **options)(function)


def compiled_sums(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `compiled`, with sums in whatever order is quickest."""
    return compiled(function, fastmath={"reassoc", "nsz"})


@compiled
def widen(bits, wide):
    """The float32 patterns of `bits`: uint16 [n] of bf16, or uint32 [n] of float32 -> uint32 [n]."""
    shift = np.uint32(32 - 8 * bits.itemsize)
    for i in range(bits.size):
        wide[i] = np.uint32(bits[i]) << shift


@compiled
def peak(patterns):
    """The float32 pattern of the largest magnitude, a NaN being larger than all: from `INFINITY` on not finite."""
    largest = np.uint32(0)
    for i in range(patterns.size):
        largest = max(largest, np.uint32(patterns[i] & ABSOLUTE))
    return largest


@compiled
def bf16_peak(bits):
    """The same of bf16 as it is stored, uint16 [n]: from `BF16_INFINITY` on not finite."""
    largest = np.uint16(0)
    for i in range(bits.size):
        largest = max(largest, np.uint16(bits[i] & BF16_ABSOLUTE))
    return largest


@compiled_sums
def squares(values):
    """The sum of squares in float32: for pieces of some thousand values."""
    total = np.float32(0)
    for i in range(values.size):
        total += values[i] * values[i]
    return total
