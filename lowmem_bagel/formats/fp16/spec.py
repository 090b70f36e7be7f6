"""fp16 weights, for cards without bfloat16. No torch."""

from __future__ import annotations

from ..dense.spec import DENSE_WAYS
from ..spec import FormatSpec

SPEC = FormatSpec("fp16", "fp16", lossless=False, ways=DENSE_WAYS)
