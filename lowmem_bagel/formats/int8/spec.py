"""INT8: symmetric per output row, `weight` int8 [out, in] and `scale` float32 [out]. No torch."""

from __future__ import annotations

from ..spec import BY_TRITON, INT8_DOT_PRODUCTS, TENSOR_CORES, ConvertOption, FormatSpec, Part, Requires, Way

MAKE = "lowmem_bagel.formats.int8.ways"
SCRATCH = 128 << 20
"""What a block of tokens takes beside the weights, as float32 and int32."""

SPEC = FormatSpec(
    "int8",
    "INT8",
    lossless=False,
    parts=(
        Part("weight", "", "I8", lambda weight: weight),
        Part("scale", "_scale", "F32", lambda weight: weight[:1]),
    ),
    runs_head=True,
    trials={
        "int8_matmul": "lowmem_bagel.formats.int8.trial:MATMUL",
        "int8_grouped": "lowmem_bagel.formats.int8.trial:GROUPED",
        "int8_pairs": "lowmem_bagel.formats.int8.trial:why_not_pairs",
        "int8_packed": "lowmem_bagel.formats.int8.trial:why_not_packed",
    },
    tuned="lowmem_bagel.formats.int8.tuning:tiles_report",
    ways=(
        Way(
            "triton", f"{MAKE}:triton", requires=BY_TRITON, says="Triton kernels on int8 tensor cores",
            products="int8", share="int8_triton_share", by_major=((9, "int8_pairs_share"),), mlp="int8 values",
        ),
        Way(
            "int_mm", f"{MAKE}:int_mm",
            requires=Requires("cuda", capability=TENSOR_CORES, capabilities=INT8_DOT_PRODUCTS),
            says="PyTorch's int8 matmul: Triton has no int8 tensor cores here",
            products="int8", share="int8_library_share", mlp="int32 product", scratch=SCRATCH,
        ),
        Way(
            "processor", f"{MAKE}:processor", requires=Requires("cpu"),
            says="PyTorch's int8 matmul or dequantised weights, whichever a trial at loading finds faster",
            products="int8", share="int8_library_share", mlp="int32 product", scratch=SCRATCH,
        ),
        Way(
            "dequantized", f"{MAKE}:dequantized",
            says="no int8 products on this card: each weight is dequantised, then multiplied",
            weights="dequantized", scratch=SCRATCH,
        ),
    ),
    options=(
        ConvertOption("rotate", "rotate inputs where that lowers the error"),
        ConvertOption("embeddings", "quantise embedding and lm_head too"),
        ConvertOption("activations", "with --rotate: safetensors file of activations to measure on", "path"),
    ),
)  # fmt: skip
