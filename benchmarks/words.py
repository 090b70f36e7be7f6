"""How rows and figures are put into words, on pages and in reports."""

from __future__ import annotations

from lowmem_bagel.formats.gguf.spec import SPECS as GGUF
from lowmem_bagel.sampling.step_caches.velocity import VELOCITY

LIBRARIES = {
    "bitsandbytes": "by bitsandbytes", "quanto": "by optimum-quanto", "dfloat11": "by the dfloat11 package's kernel",
}  # fmt: skip
"""Backends that are other people's kernels."""
FORMATS = {
    "source": "bf16",
    "dfloat11": "DFloat11",
    "int8": "INT8",
    "nf4": "NF4",
    **{spec.name: spec.title for spec in GGUF},
}
STEP_CACHES = {"taylorseer": "TaylorSeer", "first-block": "first-block cache", **{c.name: c.name for c in VELOCITY}}
WORDS = {**STEP_CACHES, "edit": "edit", **LIBRARIES}


def digits(value: float) -> str:
    """Three digits."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
