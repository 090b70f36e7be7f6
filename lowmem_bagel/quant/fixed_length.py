"""A lossless form of bf16 weights with fixed-length codes, made at load and decoded at memory speed on a GPU.

A bf16 is a sign, 8 bits of exponent and 7 of mantissa; trained weights use few exponents. Sign and mantissa are kept
as one plain byte, and the exponent becomes a 3-bit index: 0 to 6 name the seven commonest exponents of the tensor, 7
says that the exponent is an *escape*, stored apart. About 11.3 bits a weight. The idea is ZipServ's (arXiv
2603.17435); the layout is this project's.

The layout
----------
A weight is [rows, cols]; each row is padded to a multiple of `TILE` = 256 weights (indices and bytes of padding are 0:
a consumer masks columns >= cols, it must not multiply them). A tile is 256 consecutive weights of one row and `tiles`
their number in a row. All tensors are contiguous and start on their own allocation's alignment.

`exponents` uint8 [8]: exponent of index 0..6, commonest first; entry 7 is 0.

`sign_mantissa` uint8 [rows, tiles * 256]: sign << 7 | mantissa, in column order.

`index` int32 [rows, tiles * 24] (bits of unsigned words): 32 consecutive weights are three words A, B, C. A *nibble* k
is bits 4k..4k+3 of a word:

    weights  0..7    low three bits of nibbles 0..7 of A       A & 0x77777777
    weights  8..15   the same of B
    weights 16..23   the same of C
    weights 24..31   bit 0 in the top bits of A's nibbles, bit 1 in B's, bit 2 in C's:
                     (A >> 3 & 0x11111111) | (B >> 2 & 0x22222222) | (C >> 1 & 0x44444444)

so that eight indices lie in the nibbles of one register, where a byte permute (PRMT: four 3-bit selectors, 4 bits
apart, into an 8-byte table) turns them into exponents four at a time; with two tables (e >> 1 and e << 7 & 0xFF) it
gives the high and low bytes of the bf16, less sign and mantissa. A tile is 96 bytes of `index`.

`escapes` uint8 [n + padding]: the escaped exponents, in order of row, tile and column. At least 16 bytes of zeros
follow the last, so that a wide load never leaves the tensor.

`tile_starts` int32 [rows * tiles + 1]: number of escapes before each tile, then their total n. The escape of a weight
is `escapes[tile_starts[row * tiles + tile] + (escaped weights before it in its tile)]`; eight weights' escape flags are
`s & s >> 1 & s >> 2 & 0x11111111` of the word s that holds their indices, and the rank is a sum of popcounts.

Encoding and decoding here are plain torch and run on the device that the tensors are on; they are the reference for
`kernels/fixed_length*`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 256
GROUP = 32
ESCAPE = 7
WORDS_PER_TILE = TILE // GROUP * 3
ESCAPE_PADDING = 16
_CHUNK = 1 << 24
"""Weights that are worked on at once: bounds the scratch memory."""


@dataclass(frozen=True)
class FixedLength:
    """An encoded weight; the fields are described at the top of this file."""

    rows: int
    cols: int
    exponents: Tensor
    sign_mantissa: Tensor
    index: Tensor
    escapes: Tensor
    tile_starts: Tensor

    @property
    def tiles(self) -> int:
        """Tiles in a row."""
        return tiles_of(self.cols)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {
            "exponents": self.exponents,
            "sign_mantissa": self.sign_mantissa,
            "index": self.index,
            "escapes": self.escapes,
            "tile_starts": self.tile_starts,
        }

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def tiles_of(cols: int) -> int:
    """Tiles in a row of `cols` weights."""
    return -(-cols // TILE)


def encode(weight: Tensor) -> FixedLength:
    """Encode a bf16 weight [rows, cols] (fused rows of several linears share one table). Any bit pattern is kept.

    The result is on the weight's device. Scratch memory is about 16 bytes for each of `_CHUNK` weights.
    """
    assert weight.dtype == torch.bfloat16, weight.dtype
    assert weight.dim() == 2, weight.shape
    rows, cols = weight.shape
    tiles, device = tiles_of(cols), weight.device
    exponents = commonest_exponents(weight)
    lookup = torch.full((256,), ESCAPE, dtype=torch.uint8, device=device)
    for place in reversed(range(ESCAPE)):  # a table with fewer than 7 exponents repeats the first
        lookup[exponents[place].long()] = place
    sign_mantissa = torch.zeros(rows, tiles * TILE, dtype=torch.uint8, device=device)
    index = torch.empty(rows, tiles * WORDS_PER_TILE, dtype=torch.int32, device=device)
    counts = torch.zeros(rows * tiles + 1, dtype=torch.int64, device=device)
    escapes = []
    for first, last in _row_ranges(rows, tiles * TILE):
        bits = weight[first:last].contiguous().view(torch.int16)
        exponent = (bits >> 7).to(torch.uint8)  # the cast drops the sign above the exponent's eight bits
        sign_mantissa[first:last, :cols] = ((bits >> 8) & 0x80 | (bits & 0x7F)).to(torch.uint8)
        part = torch.zeros(last - first, tiles * TILE, dtype=torch.uint8, device=device)
        part[:, :cols] = lookup[exponent.int()]
        index[first:last] = pack_index(part)
        escaped = part == ESCAPE
        escapes.append(exponent[escaped[:, :cols]])
        counts[first * tiles + 1 : last * tiles + 1] = escaped.view(-1, TILE).sum(1)
    escapes.append(torch.zeros(ESCAPE_PADDING, dtype=torch.uint8, device=device))
    return FixedLength(
        rows, cols, exponents, sign_mantissa, index, torch.cat(escapes), counts.cumsum(0).to(torch.int32)
    )


def decode(encoded: FixedLength, out: Tensor | None = None) -> Tensor:
    """The bf16 weight [rows, cols], bit for bit, in `out` where it is given (bf16, contiguous, same device)."""
    rows, cols, tiles = encoded.rows, encoded.cols, encoded.tiles
    if out is None:
        out = torch.empty(rows, cols, dtype=torch.bfloat16, device=encoded.index.device)
    assert out.shape == (rows, cols), out.shape
    assert out.dtype == torch.bfloat16, out.dtype
    assert out.is_contiguous()
    bits = out.view(torch.int16)
    for first, last in _row_ranges(rows, tiles * TILE):
        part = unpack_index(encoded.index[first:last])[:, :cols]
        exponent = encoded.exponents[part.int()].to(torch.int16)
        start, end = encoded.tile_starts[[first * tiles, last * tiles]].tolist()
        exponent[part == ESCAPE] = encoded.escapes[start:end].to(torch.int16)
        plain = encoded.sign_mantissa[first:last, :cols].to(torch.int16)
        bits[first:last] = (plain & 0x80) << 8 | exponent << 7 | plain & 0x7F
    return out


def commonest_exponents(weight: Tensor) -> Tensor:
    """uint8 [8]: the seven commonest exponents of a bf16 tensor, commonest first (of equals the smaller), then 0.

    Where fewer than seven occur, the commonest fills the places that are left.
    """
    counts = torch.zeros(256, dtype=torch.int64, device=weight.device)
    flat = weight.reshape(-1).view(torch.int16)
    for start in range(0, flat.numel(), _CHUNK):
        counts += torch.bincount((flat[start : start + _CHUNK] >> 7).to(torch.uint8), minlength=256)
    order = counts.argsort(descending=True, stable=True)[:ESCAPE]
    order = torch.where(counts[order] > 0, order, order[0])
    return torch.cat([order.to(torch.uint8), order.new_zeros(1, dtype=torch.uint8)])


def pack_index(index: Tensor) -> Tensor:
    """uint8 [rows, n] of 3-bit numbers, n a multiple of 32 -> int32 [rows, n / 32 * 3]."""
    groups = index.view(index.shape[0], -1, 4, 8)
    nibbles = groups[:, :, :3].clone()
    for word in range(3):
        nibbles[:, :, word] |= ((groups[:, :, 3] >> word) & 1) << 3
    packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
    return packed.view(torch.int32).view(index.shape[0], -1)


def unpack_index(words: Tensor) -> Tensor:
    """The inverse of `pack_index`: int32 [rows, m] -> uint8 [rows, m / 3 * 32]."""
    packed = words.contiguous().view(torch.uint8).view(words.shape[0], -1, 3, 4)
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    a, b, c = (nibbles >> 3).unbind(2)
    last = a | b << 1 | c << 2
    return torch.cat([nibbles & 7, last.unsqueeze(2)], dim=2).view(words.shape[0], -1)


def _row_ranges(rows: int, width: int) -> list[tuple[int, int]]:
    step = max(1, _CHUNK // max(1, width))
    return [(first, min(rows, first + step)) for first in range(0, rows, step)]
