"""GGUF: weights in the blocks of a GGUF file, one format a type. No torch.

A folder is called by the type that most bytes of its weights have; single weights may be of another.
"""

from __future__ import annotations

from ...checkpoint.folder import ModelFolder
from ...checkpoint.gguf_blocks import BLOCK_TYPES, BlockType
from ..spec import ConvertOption, FormatSpec, Layout, Part, Requires, Way

MAKE = "lowmem_bagel.formats.gguf.ways"
SCRATCH = 128 << 20
TYPES = tuple(kind.lower() for kind in BLOCK_TYPES)
SAYS = "each weight is decoded, then multiplied"

WAYS = (
    Way("fp16", f"{MAKE}:fp16", requires=Requires(dtypes=("float16",)), says=SAYS, weights="dequantized",
        scratch=SCRATCH),
    Way("triton", f"{MAKE}:triton", requires=Requires("cuda", capability=(7, 5), features=("triton",)), says=SAYS,
        weights="dequantized", scratch=SCRATCH),
    Way(
        "cuda", f"{MAKE}:cuda", requires=Requires("cuda", ("bfloat16",), features=("nvrtc",)), says=SAYS,
        weights="dequantized", scratch=SCRATCH,
    ),
    Way("dequantized", f"{MAKE}:dequantized", says=SAYS, weights="dequantized", scratch=SCRATCH),
)  # fmt: skip


def format_of(kind: str) -> str:
    """The format's name for a type of blocks."""
    return f"gguf-{kind.lower()}"


def _layout(folder: ModelFolder) -> Layout:
    """Every tensor lies under its own name; those in blocks are encoded."""
    return Layout({name: (name,) for name, stored in folder.stored.items() if stored.encoded})


def _spec(kind: BlockType) -> FormatSpec:
    return FormatSpec(
        format_of(kind.name),
        f"GGUF {kind.name}",
        lossless=False,
        parts=(Part("weight", "", kind.name, lambda weight: (kind.bytes_of(weight),)),),
        layout=_layout,
        ways=WAYS,
        family="gguf",
        trials={
            format_of(kind.name): f"lowmem_bagel.formats.gguf.trial:{kind.name}",
            "gguf_packed": "lowmem_bagel.formats.gguf.trial:why_not_packed",
        },
        options=(ConvertOption("type", "type of the blocks", "text", choices=TYPES, converter="gguf"),),
    )


SPECS = tuple(map(_spec, BLOCK_TYPES.values()))
