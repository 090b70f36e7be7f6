"""A weight in the fixed-length lossless form as the GPU's kernels read it, and what they compute, in torch operations.

The layout is that of `quant/fixed_length.py`. A GPU finds escapes faster in a list than by counting flags, so `pack`
turns the stream of escaped exponents into (column in the tile, whole bf16) pairs: 24 bits for each escape instead of 8,
about 0.4 bits a weight more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.linear import rms_norm, swiglu
from ..quant import fixed_length as layout

_ESCAPE_PADDING = 16

PACKED_TENSORS = (
    "exponents", "sign_mantissa", "index", "tile_starts", "escape_values", "escape_columns",
)  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A weight [rows, cols] as the kernels read it; all tensors are on the weight's device and contiguous.

    `exponents`, `sign_mantissa`, `index` and `tile_starts` are as in `quant/fixed_length.py`. Escape i of the order
    given there is `escape_columns[i]`, uint8, its column within its tile, and `escape_values[i]`, int16, its bf16 bits.
    """

    rows: int
    cols: int
    exponents: Tensor
    sign_mantissa: Tensor
    index: Tensor
    tile_starts: Tensor
    escape_values: Tensor
    escape_columns: Tensor

    @property
    def tiles(self) -> int:
        """Tiles of a row."""
        return layout.tiles_of(self.cols)

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in PACKED_TENSORS)


def pack(encoded: layout.FixedLength) -> Packed:
    """The kernels' form of an encoded weight, on its device; shares all tensors but the escapes."""
    escaped_rows = []
    width = encoded.tiles * layout.TILE
    step = max(1, (1 << 24) // width)
    for first in range(0, encoded.rows, step):
        index = layout.unpack_index(encoded.index[first : first + step])
        escaped_rows.append(
            (index == layout.ESCAPE).flatten().nonzero().flatten() + first * encoded.tiles * layout.TILE
        )
    places = torch.cat(escaped_rows)
    plain = encoded.sign_mantissa.view(-1)[places].to(torch.int16)
    exponent = encoded.escapes[: len(places)].to(torch.int16)
    values = (plain & 0x80) << 8 | exponent << 7 | plain & 0x7F
    return Packed(
        encoded.rows, encoded.cols, encoded.exponents, encoded.sign_mantissa, encoded.index, encoded.tile_starts,
        F.pad(values, (0, _ESCAPE_PADDING)), F.pad((places % layout.TILE).to(torch.uint8), (0, _ESCAPE_PADDING)),
    )  # fmt: skip


def encode(weight: Tensor) -> Packed:
    """bf16 [rows, cols] -> Packed, on the weight's device, in torch operations."""
    return pack(layout.encode(weight))


def decode_reference(weight: Packed) -> Tensor:
    """The bf16 weight [rows, cols], bit for bit, in torch operations: the kernels' reference and fallback."""
    index = layout.unpack_index(weight.index)
    plain = weight.sign_mantissa.to(torch.int16)
    bits = (plain & 0x80) << 8 | weight.exponents[index.int()].to(torch.int16) << 7 | plain & 0x7F
    bits[index == layout.ESCAPE] = weight.escape_values[: int(weight.tile_starts[-1])]
    return bits[:, : weight.cols].contiguous().view(torch.bfloat16)


def matmul_reference(
    weight: Packed,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    gated: bool = False,
) -> Tensor:
    """What `FixedLengthKernels.matmul` computes, by decoding and `F.linear`."""
    if norm is not None:
        x = rms_norm(x, *norm)
    if gated:
        x = swiglu(x)
    return F.linear(x, decode_reference(weight).to(x.dtype), bias)
