"""Code books: prefix-free, short enough, and decodable by the package's kernel, whatever the counts are."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.code_books import assert_code_book, fibonacci, look_up

from lowmem_bagel.formats.dfloat11 import huffman


@given(arrays(np.int64, 256, elements=st.integers(0, 2**26), fill=st.just(0)).filter(lambda counts: counts.any()))
@settings(max_examples=60)
def test_every_histogram_has_a_code_book(counts: np.ndarray) -> None:
    assert_code_book(counts)


@pytest.mark.parametrize(
    "counts",
    [
        fibonacci(50, 80),
        fibonacci(36, 218),
        np.ones(256, dtype=np.int64),
        np.where(np.arange(256) == 7, 10**9, 1),
        np.where(np.arange(256) >= 240, 10**9, np.arange(256) % 2),
        (2.0 ** np.minimum(np.arange(256) / 3, 40)).astype(np.int64),
    ],
    ids=["long", "long with infinities", "uniform", "one common", "large ones common", "geometric"],
)
def test_hard_histograms(counts: np.ndarray) -> None:
    assert_code_book(counts)


def tables_needed(codes: huffman.Codes) -> int:
    """One for the first byte, and one for every longer code's beginnings of whole bytes."""
    leaves = [code for symbol, code in codes.items() if symbol != huffman.END]
    fronts = {(n, value >> (bits - 8 * n)) for bits, value in leaves for n in range(1, (bits - 1) // 8 + 1)}
    return 1 + len(fronts)


def test_one_table_more_than_there_are_pointers() -> None:
    random = Random(27)
    used = random.sample(range(240), random.randrange(20, 230))
    counts = np.zeros(256, dtype=np.int64)
    for symbol in sorted(used):
        counts[symbol] = 2 ** (random.random() * random.choice([10, 20, 30]))
    codes = huffman.limited_codes({symbol: int(count) for symbol, count in enumerate(counts) if count})
    assert tables_needed(codes) == 18
    assert huffman.tables(codes) is None
    assert_code_book(counts)


def test_any_bits_at_all_find_a_symbol() -> None:
    """The package's kernel decodes what follows the last code too; a symbol without a length would hold it for ever.

    The package's own tables for these counts have such an entry.
    """
    counts = np.zeros(256, dtype=np.int64)
    counts[[19, 37, 61, 70, 72, 82, 88, 92, 94, 95, 111, 126, 203, 204]] = (
        52,
        13,
        73,
        3,
        25,
        9,
        194,
        1,
        11,
        57,
        6,
        12,
        2,
        11,
    )
    book = assert_code_book(counts)
    for front in range(1 << 16):
        for rest in (0, 0xFFFF):
            assert book.luts[-1, look_up(book.luts, front << 16 | rest)], front
