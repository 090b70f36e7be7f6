"""GGUF's blocks: weights quantised to them, and their values. What the blocks are is in `checkpoint.gguf_blocks`.

A weight is kept as the bytes that it has in a GGUF file, uint8 [nbytes], row after row. Q8_0's bytes are those that
every quantiser makes; those of the K types depend on how scales are looked for (see `loops`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checkpoint.gguf_blocks import BLOCK_TYPES, decoded
from ...errors import ConversionError
from ..rows import Empty, by_loop, encode_rows, roomy

NOT_FINITE = "holds an infinite or NaN value, or one that fp16 scales are too small for; take other weights"


def encode(weight: Tensor, kind: str, empty: Empty = roomy) -> tuple[Tensor, float]:
    """Quantise a matrix [out, in] of floats on the CPU to blocks of a type: in one pass on all cores.

    Returns:
        the bytes, uint8 [out, nbytes of a row], and |decoded - weight| / |weight|.

    Raises:
        ConversionError: rows are no whole blocks, or a value cannot be held. The caller adds the name.
    """
    assert by_loop(weight) and weight.dim() == 2, "converters give matrices on the CPU"
    from . import loops

    rows, width = weight.shape
    block = BLOCK_TYPES[kind]
    if width % block.values:
        raise ConversionError(
            f"has rows of {width}, not a multiple of {block.values}: {kind} cannot hold it; take another type"
        )
    loop = {
        "Q8_0": loops.encode_q8_0, "Q6_K": loops.encode_q6_k, "Q5_K": loops.encode_q5_k, "Q4_K": loops.encode_q4_k,
    }[kind]  # fmt: skip
    out = empty((rows, block.bytes_of((width,))), torch.uint8)
    error = encode_rows(loop, weight, (out,))
    if error is None:
        raise ConversionError(NOT_FINITE)
    return out, error


def dequantize(raw: Tensor, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Blocks -> dense [out, in], in float32's arithmetic, rounded once."""
    return decoded(raw, kind, shape, dtype)
