"""Code books: prefix-free, short enough, and decodable by the package's kernel, whatever the counts are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.code_books import assert_code_book, fibonacci


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
