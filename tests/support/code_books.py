"""What every code book of the DFloat11 format must be, for tests."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from lowmem_bagel.formats.dfloat11 import huffman


def fibonacci(symbols: int, first: int) -> np.ndarray:
    counts = np.zeros(256, dtype=np.int64)
    low, high = 1, 1
    for symbol in range(first, first + symbols):
        counts[symbol] = low
        low, high = high, low + high
    return counts


def look_up(luts: np.ndarray, front: int) -> int:
    """The symbol at the front of 32 bits, by the rule of the package's kernel."""
    table = 0
    for level in range(4):
        entry = int(luts[table, front >> (24 - 8 * level) & 255])
        if entry < 240 or level == 3:
            break
        table = 256 - entry
    return entry


def assert_code_book(counts: np.ndarray) -> huffman.CodeBook:
    """Prefix-free, at most 32 bits, decodable by the tables within the package kernel's rules."""
    book = huffman.code_book(counts)
    lengths = book.lengths()
    assert np.array_equal(lengths > 0, counts > 0)
    assert lengths.max() <= 32
    assert 1 <= len(book.luts) - 1 <= 17
    aligned = book.left_aligned()
    ranges = sorted((int(aligned[s]), int(aligned[s]) + (1 << (64 - int(lengths[s])))) for s in np.flatnonzero(counts))
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    for symbol in np.flatnonzero(counts):
        for fill in (0, (1 << (64 - int(lengths[symbol]))) - 1):
            assert look_up(book.luts, (int(aligned[symbol]) | fill) >> 32) == symbol
    return book
