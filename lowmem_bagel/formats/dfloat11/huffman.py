"""Code books of the DFloat11 format: Huffman codes of exponents and the byte-wise tables that decode them. Pure data.

A code book is made as the `dfloat11` 0.5.0 package makes it (which uses `dahuffman`), so that files are identical:
an end mark with count 1 is a symbol too; of nodes of equal count the one whose first leaf is smaller goes first, the
end mark before all; the lighter node takes bit 0. Codes over 32 bits are avoided by setting the smallest counts to 1.

The package's tables cannot hold every such code: an entry from 240 on is a pointer, so exponents from 240 (infinity,
NaN and magnitudes from 2^113) read as pointers, at most 16 tables can be pointed to, and slot 0 must belong to a
symbol, which fails for tiny and constant tensors. Where the package would raise or write what its own kernel cannot
read, `code_book` uses *flat* codes instead: at most 8 bits for exponents below 240, and 32 bits for the others, whose
last byte is looked up in a fourth table that the package's kernel reads without the test for pointers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
from numpy.typing import NDArray

END = -1
"""The end mark; smaller than every exponent, as in the package."""
MAX_BITS = 32
LEVELS = 4
FIRST_POINTER = 240
"""Table entries from here on point to table 256 - entry, except in the fourth lookup."""
MAX_TABLES = 1 + 256 - FIRST_POINTER

Codes = dict[int, tuple[int, int]]
"""symbol -> (bits, value), in ascending order of the codes read as binary fractions."""


@dataclass(frozen=True)
class CodeBook:
    """Codes of the exponents that occur (and of `END`, except in flat codes), and `luts` uint8 [tables + 1, 256]:
    the decode tables, then the code lengths."""

    codes: Codes
    luts: NDArray[np.uint8]

    def lengths(self) -> NDArray[np.int64]:
        """int64 [256]: bits of each exponent's code, 0 for those without one."""
        lengths: NDArray[np.int64] = self.luts[-1].astype(np.int64)
        return lengths

    def left_aligned(self) -> NDArray[np.uint64]:
        """uint64 [256]: each exponent's code in the highest bits."""
        aligned = np.zeros(256, dtype=np.uint64)
        for symbol, (bits, value) in self.codes.items():
            if symbol != END:
                aligned[symbol] = value << (64 - bits)
        return aligned

    def end_mark(self) -> int:
        """The end mark's code in the highest of 64 bits; 0 without one. It fills the last byte of a stream."""
        bits, value = self.codes.get(END, (1, 0))
        return value << (64 - bits)


def code_book(counts: NDArray[np.int64]) -> CodeBook:
    """The code book for exponents that occur `counts` times; counts: int64 [256], at least one of them not 0."""
    used = {symbol: int(count) for symbol, count in enumerate(counts) if count}
    assert used, "no weights"
    codes = limited_codes(used)
    luts = tables(codes)
    if luts is None:
        codes = flat_codes(used)
        luts = tables(codes)
        assert luts is not None, "flat codes always fit"
    return CodeBook(codes, luts)


def huffman(counts: Mapping[int, int]) -> Codes:
    """Huffman codes of symbols that occur `counts` times. A single symbol gets no bits."""
    heap = [(count, symbol, [(symbol, 0, 0)]) for symbol, count in counts.items()]
    heapify(heap)
    while len(heap) > 1:
        count_0, first, zeros = heappop(heap)
        count_1, _, ones = heappop(heap)
        leaves = [(s, bits + 1, value) for s, bits, value in zeros]
        leaves += [(s, bits + 1, value | 1 << bits) for s, bits, value in ones]
        heappush(heap, (count_0 + count_1, first, leaves))
    return {symbol: (bits, value) for symbol, bits, value in heap[0][2]}


def limited_codes(counts: Mapping[int, int]) -> Codes:
    """The package's codes: `counts` (ascending by symbol) and the end mark, at most `MAX_BITS` bits each.

    Which of equal counts are set to 1 first is left to `numpy.argpartition`, as in the package.
    """
    codes = huffman({**counts, END: 1})
    symbols, values = np.array(list(counts)), np.array(list(counts.values()))
    smallest = 2
    while max(bits for bits, _ in codes.values()) > MAX_BITS:
        ones = symbols[np.argpartition(values, smallest)[:smallest]]
        codes = huffman({**counts, **dict.fromkeys(ones.tolist(), 1), END: 1})
        smallest += 1
    return codes


def flat_codes(counts: Mapping[int, int]) -> Codes:
    """Codes that the package's kernel can decode whatever the exponents are; see the top of this file."""
    large = [symbol for symbol in counts if symbol >= FIRST_POINTER]
    small = {symbol: count for symbol, count in counts.items() if symbol < FIRST_POINTER}
    if large:
        small[FIRST_POINTER] = sum(counts[symbol] for symbol in large)
    codes = huffman(small)
    while max(bits for bits, _ in codes.values()) > 8:
        small = {symbol: (count + 1) // 2 for symbol, count in small.items()}
        codes = huffman(small)
    if len(codes) == 1:
        # one bit would do, but then 32768 outputs a block, more than the package's kernel has shared memory for
        codes = dict.fromkeys(codes, (2, 0))
    flat: Codes = {}
    for symbol, (bits, value) in codes.items():
        if symbol < FIRST_POINTER:
            flat[symbol] = (bits, value)
        else:
            flat |= {s: (32, value << (32 - bits) | place) for place, s in enumerate(large)}
    return flat


def tables(codes: Codes) -> NDArray[np.uint8] | None:
    """`luts` uint8 [tables + 1, 256] of the codes, or None where the format cannot hold them.

    Table 0 is indexed by the first byte of the stream; an entry from 240 on leads to the table for the next byte.
    A slot that no code reaches repeats the one before it (of the table before, for a first slot): so does the package.
    """
    leaves = {symbol: code for symbol, code in codes.items() if symbol != END}
    if any(symbol >= FIRST_POINTER and bits <= 8 * (LEVELS - 1) for symbol, (bits, _) in leaves.items()):
        return None
    prefixes: list[tuple[int, int]] = [(0, 0)]  # (bytes, value)
    for bits, value in leaves.values():
        for depth in range(1, (bits - 1) // 8 + 1):
            prefix = (depth, value >> (bits - 8 * depth))
            if prefix not in prefixes:
                prefixes.append(prefix)
    prefixes.sort(key=lambda prefix: prefix[0])
    if len(prefixes) > MAX_TABLES:
        return None
    number = {prefix: place for place, prefix in enumerate(prefixes)}
    luts = np.zeros((len(prefixes) + 1, 256), dtype=np.uint8)
    filler: int | None = None
    for place, (depth, start) in enumerate(prefixes):
        slots: dict[int, int] = {}
        for symbol, (bits, value) in leaves.items():
            if bits <= 8 * depth or value >> (bits - 8 * depth) != start:
                continue
            if bits <= 8 * (depth + 1):
                slots[(value << (8 * (depth + 1) - bits)) & 0xFF] = symbol
            else:
                longer = value >> (bits - 8 * (depth + 1))
                slots[longer & 0xFF] = 256 - number[depth + 1, longer]
        for slot in range(256):
            filler = slots.get(slot, filler)
            if filler is None:
                return None
            luts[place, slot] = filler
    for symbol, (bits, _) in leaves.items():
        luts[-1, symbol] = bits
    return luts if _always_ends(luts) else None


def _always_ends(luts: NDArray[np.uint8]) -> bool:
    """Whether any bits at all find a symbol that has a length.

    The package's kernel also decodes what follows the last code of a stream; a length of 0 would hold it for ever.
    """
    seen, waiting = {(0, 1)}, [(0, 1)]
    while waiting:
        table, level = waiting.pop()
        for entry in luts[table].tolist():
            if entry < FIRST_POINTER or level == LEVELS:
                if luts[-1, entry] == 0:
                    return False
                continue
            below = (256 - entry, level + 1)
            if below[0] >= len(luts) - 1:
                return False
            if below not in seen:
                seen.add(below)
                waiting.append(below)
    return True
