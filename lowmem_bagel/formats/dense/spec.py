"""How dense weights are multiplied, those too that other formats leave or make dense. No torch."""

from __future__ import annotations

from ..spec import BY_TRITON, Requires, Way

MAKE = "lowmem_bagel.formats.dense.ways"
HALF = ("bfloat16", "float16")

DENSE_WAYS = (
    Way(
        "triton, SwiGLU in the matmul", f"{MAKE}:triton_swiglu", adds=True, swiglu_in_matmul=True,
        requires=Requires("cuda", ("bfloat16",), (9, 0), major=9, features=("triton",)),
        says="dense weights, norms and SwiGLU fused by Triton",
    ),
    Way(
        "triton", f"{MAKE}:triton", adds=True, says="dense weights, norms and SwiGLU fused by Triton",
        requires=Requires("cuda", ("bfloat16", "float32"), BY_TRITON.capability, features=("triton",)),
    ),
    Way(
        "cuda", f"{MAKE}:cuda", adds=True, says="dense weights",
        requires=Requires("cuda", ("bfloat16",), features=("nvrtc",)),
    ),
    Way("fp16", f"{MAKE}:fp16", adds=True, requires=Requires(dtypes=("float16",)), says="dense weights"),
    Way("torch", f"{MAKE}:torch_", adds=True, says="dense weights"),
)  # fmt: skip
"""How dense weights are multiplied, also those that other formats leave or make dense. "fp16" scales each token."""
