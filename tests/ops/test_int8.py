"""The int8 product at the edge of int32."""

from __future__ import annotations

import pytest
import torch

from lowmem_bagel.ops.int8 import MAX_IN_FEATURES, int_mm


def test_the_longest_row_is_exact_and_a_longer_one_is_refused() -> None:
    """All values as large as they can be: one more product would not fit into int32."""
    longest = torch.full((1, MAX_IN_FEATURES), 127, dtype=torch.int8)
    assert int_mm(longest, longest).item() == MAX_IN_FEATURES * 127**2
    assert (MAX_IN_FEATURES + 1) * 127**2 > 2**31 - 1
    longer = torch.full((1, MAX_IN_FEATURES + 1), 127, dtype=torch.int8)
    with pytest.raises(AssertionError, match="could overflow"):
        int_mm(longer, longer)
