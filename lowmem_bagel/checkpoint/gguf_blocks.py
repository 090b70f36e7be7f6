"""The types of tensors in GGUF files: how many bytes their blocks take, and what values the blocks stand for.

A block is so many consecutive values of a row; little-endian, fp16 scales:

    Q8_0  32 values, 34 bytes: d, 32 int8 q                             d * q
    Q4_K  256 values, 144 bytes: d, dmin, scales[12], q[128]            (d * scale) * q - dmin * min
    Q5_K  256 values, 176 bytes: d, dmin, scales[12], top[32], q[128]   the same
    Q6_K  256 values, 210 bytes: q[128], top[64], int8 scale[16], d     (d * scale) * (q - 32)

In Q4_K and Q5_K, 32 values share a 6-bit scale and a 6-bit min; 32 bytes of q hold 64 values, those in the low four
bits first, and bit i of top[j] is the fifth bit of value 32 i + j. In Q6_K, 16 values share a scale, and 64 bytes of q
and 32 of top hold 128 values. Products of a scale are exact in float32, and what is left is rounded once: whoever
decodes gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class BlockType:
    """A type of quantised tensors: `number` is GGUF's; a block of `values` takes `nbytes`."""

    name: str
    number: int
    values: int
    nbytes: int

    def bytes_of(self, shape: tuple[int, ...]) -> int:
        """Of a tensor of this shape, whose last size is a multiple of `values`."""
        return math.prod(shape) // self.values * self.nbytes


BLOCK_TYPES: Mapping[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q6_K", 14, 256, 210),
        BlockType("Q5_K", 13, 256, 176),
        BlockType("Q4_K", 12, 256, 144),
    )
}
FLOAT_TYPES: Mapping[int, str] = {0: "F32", 1: "F16", 30: "BF16"}
"""GGUF's numbers of the types that safetensors has too."""
OTHER_TYPES: Mapping[int, str] = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""Types that are not read, for messages."""
AT_ONCE = 1 << 18
"""Values that are decoded at a time: what is between stays in a processor's cache."""


def decoded(raw: Tensor, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that blocks of a type stand for, of `shape` and a float dtype: float32's arithmetic, rounded once.

    raw: uint8, of `bytes_of(shape)` bytes, on any device.
    """
    import torch

    block = BLOCK_TYPES[kind]
    blocks = raw.reshape(-1, block.nbytes)
    out = torch.empty(len(blocks), block.values, dtype=dtype, device=raw.device)
    step = (AT_ONCE if raw.device.type == "cpu" else 64 * AT_ONCE) // block.values
    for start in range(0, len(blocks), step):
        part = slice(start, start + step)
        out[part] = _DECODE[kind](blocks[part]).reshape(-1, block.values)
    return out.view(shape)


def _float16(data: Tensor) -> Tensor:
    """Pairs of bytes [n, 2k] as the float32 of their fp16 numbers [n, k]."""
    import torch

    return data.contiguous().view(torch.float16).float()


def _q8_0(blocks: Tensor) -> Tensor:
    import torch

    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(_float16(blocks[:, :2]))


def _q4_k(blocks: Tensor) -> Tensor:
    return _scaled(blocks, _nibbles(blocks[:, 16:144]))


def _q5_k(blocks: Tensor) -> Tensor:
    q, top = _nibbles(blocks[:, 48:176]), blocks[:, None, 16:48]
    return _scaled(blocks, q | (top >> _shifts(blocks, 1, 8) & 1) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    import torch

    q, top = blocks[:, :128].reshape(-1, 2, 1, 64), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = torch.cat((q & 15, q >> 4), dim=2).view(-1, 2, 4, 32)
    values = (low | (top >> _shifts(blocks, 2, 4) & 3) << 4).view(-1, 16, 16).float().sub_(32)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float() * _float16(blocks[:, 208:210])
    return values.mul_(scales[:, :, None])


def _nibbles(q: Tensor) -> Tensor:
    """uint8 [n, 128] -> [n, 8, 32]: of each 32 bytes the low four bits, then the high ones."""
    import torch

    pairs = q.reshape(-1, 4, 1, 32)
    return torch.cat((pairs & 15, pairs >> 4), dim=2).view(-1, 8, 32)


def _shifts(like: Tensor, step: int, count: int) -> Tensor:
    """0, step, 2 step ... [count, 1]."""
    import torch

    return torch.arange(0, step * count, step, dtype=torch.uint8, device=like.device)[:, None]


def _scaled(blocks: Tensor, q: Tensor) -> Tensor:
    """Values [n, 8, 32] of blocks that begin with d, dmin and the packed scales and mins."""
    import torch

    factors, packed = _float16(blocks[:, :4]), blocks[:, 4:16]
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, last & 15 | first >> 6 << 4), dim=1).float() * factors[:, :1]
    mins = torch.cat((second & 63, last >> 4 | second >> 6 << 4), dim=1).float() * factors[:, 1:]
    return q.float().mul_(scales[:, :, None]).sub_(mins[:, :, None])


_DECODE = {"Q8_0": _q8_0, "Q6_K": _q6_k, "Q5_K": _q5_k, "Q4_K": _q4_k}
