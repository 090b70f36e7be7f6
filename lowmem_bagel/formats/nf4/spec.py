"""NF4: bitsandbytes' 4-bit NormalFloat in blocks of 64 values. No torch."""

from __future__ import annotations

import math

from ..spec import FormatSpec, Part, Requires, Shape, Way

MAKE = "lowmem_bagel.formats.nf4.ways"
BLOCK = 64
"""Consecutive values of a row that share an absmax."""
SCRATCH = 128 << 20
SAYS = "each weight is dequantised, then multiplied"


def side_by_side(weight: Shape) -> Shape:
    """[rows, width] with as many rows side by side as make whole blocks; routed experts have rows of odd lengths."""
    rows, width = weight
    together = BLOCK // math.gcd(BLOCK, width)
    return rows // together, width * together


def _scales(rows: int, width: int) -> Shape:
    return rows, width // BLOCK


SPEC = FormatSpec(
    "nf4",
    "NF4",
    lossless=False,
    parts=(
        Part("weight", "", "U8", lambda weight: (weight[0], weight[1] // 2)),
        Part("absmax", "_absmax", "F32", lambda weight: _scales(*side_by_side(weight))),
    ),
    trials={
        "nf4": "lowmem_bagel.formats.nf4.trial:TRITON",
        "nf4_packed": "lowmem_bagel.formats.nf4.trial:why_not_packed",
    },
    ways=(
        Way(
            "fp16", f"{MAKE}:fp16", requires=Requires(dtypes=("float16",)), says=SAYS, weights="dequantized",
            scratch=SCRATCH,
        ),
        Way(
            "triton", f"{MAKE}:triton", requires=Requires("cuda", capability=(7, 5), features=("triton",)), says=SAYS,
            weights="dequantized", scratch=SCRATCH,
        ),
        Way(
            "cuda", f"{MAKE}:cuda", requires=Requires("cuda", ("bfloat16",), features=("nvrtc",)), says=SAYS,
            weights="dequantized", scratch=SCRATCH,
        ),
        Way("dequantized", f"{MAKE}:dequantized", says=SAYS, weights="dequantized", scratch=SCRATCH),
    ),
)  # fmt: skip
