"""The checkpoint as it is: weights in the dtype of the arithmetic. No torch."""

from __future__ import annotations

from ..dense.spec import DENSE_WAYS
from ..spec import FormatSpec

SPEC = FormatSpec("source", "bf16", lossless=True, ways=DENSE_WAYS)
CONVERTED = FormatSpec("bf16", "bf16", lossless=True, ways=DENSE_WAYS)
"""A folder that was converted, from a checkpoint in any dtype."""
