"""NF4 weights (stored as `formats.nf4.codec` says): dequantised at memory speed, or read once for one to eight tokens.

There is no time for a table in memory: at memory speed a multiprocessor must decode over 30 values a cycle. On CUDA the
levels are looked up byte by byte, four codes at a time, with the byte permutation instruction, `prmt`, whose table is a
pair of registers: two tables of eight for each byte of a level, chosen between by the code's top bit.

Dequantising looks up the four bytes of a float32, exactly. Reading once looks up two bytes, `high` and `low`, of
f = SPACING * level + MIDDLE, a positive number below 2^23 which, as it is, makes the bits of a denormal float32: no
conversion, and multiplying by it is exact. Its last byte repeats the one before. So levels are off by at most 2^-15, a
thousandth of the distance between two.

The choice between two tables costs one instruction for four codes, since `prmt` looks at a code's top bit too: where
it is set, the looked up byte's top bit is returned eight times. Of two look-ups, by the codes and by the codes with
their top bits turned over, one therefore gives a byte and the other 0 or 255, and `xor` makes the wanted byte of both,
if the tables are made for it (`_tables`).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import struct
from collections.abc import Callable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.elementwise import normalized, swiglu_fused
from ...kernels.gemv import MAX_ROWS, gemv_options, gemv_reference
from ...kernels.packed_gemv import Code, Strip, asm_floats, packed_gemv
from ...kernels.triton_language import ceil_div, interpreted, jit, tl
from ...ops.linear import After, Before, Dense, Product, Rows, SwiGLU, Weights, count_tokens, joined
from ...ops.routed import Groups, Routes
from .codec import dequantize
from .levels import BLOCK, CODEBOOK

ONE_KERNEL_TOKENS = 2
"""Up to so many, the weight is read once; for more it is dequantised for the library's matmul, which won for six on an
H200."""
SPACING, MIDDLE = 3872776, 4129557
"""Found by trying: levels -1 and 1 fall into 0 to 2^23, `low`'s top bit is the same for codes i and i + 8, and errors
are the smallest under these conditions."""


def _look_up(codes: str, planes: Mapping[str, list[int]]) -> list[str]:
    """PTX: for the four codes in the low 16 bits of the register `codes`, least significant first, each plane's bytes.

    planes: the register that gets the four bytes, and the 16 bytes to choose from.
    """
    lines = [
        f"and.b32 sel, {codes}, 0x7777;",
        f"shr.b32 top, {codes}, 3;",
        "and.b32 top, top, 0x1111;",
        "prmt.b32 top, 0x0000ff00, 0, top;",
    ]
    for register, plane in planes.items():
        first, second, third, fourth = (int.from_bytes(bytes(plane[i : i + 4]), "little") for i in (0, 4, 8, 12))
        lines += [
            f"prmt.b32 a, {first:#x}, {second:#x}, sel;",
            f"prmt.b32 b, {third:#x}, {fourth:#x}, sel;",
            f"lop3.b32 {register}, top, b, a, 0xca;",  # top ? b : a
        ]
    return lines


def _decode(half: Callable[[str, list[str]], list[str]]) -> str:
    """PTX for four packed bytes in $8: $0 to $3 become their high codes' floats, $4 to $7 their low codes'."""
    first, second = half("$8", ["$4", "$0", "$5", "$1"]), half("rest", ["$6", "$2", "$7", "$3"])
    registers = ".reg .b32 sel, top, a, b, p0, p1, p2, p3, rest;"
    return "\n".join(("{", registers, "shr.b32 rest, $8, 16;", *first, *second, "}"))


@cache
def exact_ptx() -> str:
    """The float32 level of each code, all bits."""
    levels = [struct.pack("<f", level) for level in CODEBOOK]
    planes = {f"p{i}": [level[i] for level in levels] for i in range(4)}

    def half(codes: str, outputs: list[str]) -> list[str]:
        lines = _look_up(codes, planes)
        for pair, order in ((outputs[:2], "0x5140"), (outputs[2:], "0x7362")):
            lines += [f"prmt.b32 a, p0, p1, {order};", f"prmt.b32 b, p2, p3, {order};"]
            lines += [f"prmt.b32 {output}, a, b, {o};" for output, o in zip(pair, ("0x5410", "0x7632"), strict=True)]
        return lines

    return _decode(half)


def _tables() -> list[list[int]]:
    """`high` for codes below 8 and from 8 on, then `low` likewise: the bytes that, looked up as above, give the levels.

    Where both bytes of a pair i, i + 8 have a top bit of 0, the other look-up gives 0. Where both have 1, the second is
    turned over: then its top bit is 0, and it is turned back by the 255 which the first gives.
    """
    values = [round(SPACING * level + MIDDLE) for level in CODEBOOK]
    high = [value >> 16 for value in values]
    low = [min(255, round((value & 0xFFFF) / 257)) for value in values]
    turned = [byte ^ (255 if byte & 128 else 0) for byte in low[8:]]
    return [high[:8], high[8:], low[:8], turned]


def _first_words() -> str:
    """PTX: the first halves of the four tables into $0 to $3, in a way that hides from the compiler that they are
    constants: it would copy them anew for every look-up, whose other three operands are not registers either."""
    lines = [".reg .b32 zero;", "mov.u32 zero, %lanemask_lt;", "shr.u32 zero, zero, 31;"]
    for i, table in enumerate(_tables()):
        lines.append(f"xor.b32 ${i}, zero, {int.from_bytes(bytes(table[:4]), 'little'):#x};")
    return "\n".join(("{", *lines, "}"))


def _decode_word() -> str:
    """PTX: the eight codes of word $8, low code of a byte second, become $0 to $7; $9 to $12: of `_first_words`."""
    high0, high1, low0, low1 = (f"{int.from_bytes(bytes(table[4:]), 'little'):#x}" for table in _tables())

    def half(codes: str, turned: str, outputs: str) -> list[str]:
        lines = [
            f"prmt.b32 a, $9, {high0}, {codes};",
            f"prmt.b32 b, $10, {high1}, {turned};",
            "add.u32 high, a, b;",  # `xor` would do; additions can also be executed where multiplications are
            f"prmt.b32 a, $11, {low0}, {codes};",
            f"prmt.b32 b, $12, {low1}, {turned};",
            "xor.b32 low, a, b;",
        ]
        for i, output in enumerate(outputs):  # bytes low, low, high, and the top bit of `high`, 0, eight times
            lines.append(f"prmt.b32 ${output}, low, high, {(12 + i) << 12 | (4 + i) << 8 | i << 4 | i:#x};")
        return lines

    return "\n".join((
        "{", ".reg .b32 turned, rest, rest_turned, a, b, high, low;",
        "xor.b32 turned, $8, 0x88888888;", *half("$8", "turned", "1032"),
        "shr.b32 rest, $8, 16;", "shr.b32 rest_turned, turned, 16;", *half("rest", "rest_turned", "5476"), "}",
    ))  # fmt: skip


@cache
def nf4_weights() -> Code:
    """Eight NF4 codes in a word, high nibble first."""
    if interpreted():
        return Code(_levels, _level_tables, BLOCK, levels=CODEBOOK)
    up = 2.0**64  # denormals are this far below the numbers that x may be
    return Code(
        _levels, _level_tables, BLOCK, _decode_word(), _first_words(),
        up=up, down=2.0**149 / up / SPACING, shift=MIDDLE * up / 2.0**149,
    )  # fmt: skip


def nf4_gemv_reference(x: Tensor, weight: Tensor, absmax: Tensor, **options: object) -> Tensor:
    """`gemv_reference` with the NF4 weight (uint8 [N, K / 2], float32 [N, K / 64]) dequantised to float32."""
    return gemv_reference(x, dequantize(weight, absmax, torch.float32), **options)  # type: ignore[arg-type]


def nf4_gemv(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor,
    *,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu_input: bool = False,
    swiglu_output: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    strip: Strip | None = None,
) -> Tensor:
    """Like `nf4_gemv_reference`, for at most MAX_ROWS tokens."""
    assert x.numel() <= MAX_ROWS * x.shape[-1], "too many tokens for a one-token linear"
    return packed_gemv(
        x, weight.view(torch.int32), absmax, nf4_weights(), bias=bias, norm=norm, eps=eps,
        swiglu_input=swiglu_input, swiglu_output=swiglu_output, residual=residual, dtype=dtype, strip=strip,
    )  # fmt: skip


def nf4_dequantize(weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """`codec.dequantize` in one pass: uint8 [N, K / 2], float32 [N, K / 64] -> dtype [N, K], the same bits."""
    n, half = weight.shape
    assert weight.is_contiguous(), "the weight must be contiguous"
    assert absmax.is_contiguous(), "absmax must be contiguous"
    out = torch.empty(n, 2 * half, dtype=dtype, device=weight.device)
    blocks = weight.numel() * 2 // BLOCK
    step = 64
    _nf4_dequantize[(ceil_div(blocks, step),)](
        weight, absmax, out, blocks,
        PTX=None if interpreted() else exact_ptx(), LEVELS=CODEBOOK if interpreted() else None,
        BLOCKS=step, num_warps=4,
    )  # fmt: skip
    return out


class TritonNf4(Product):
    """One kernel up to ONE_KERNEL_TOKENS, else the weight is dequantized whole for the library's matmul.

    dense: multiplies groups by dequantized weights.
    """

    def __init__(self, dense: Product | None = None) -> None:
        self.dense = dense or Dense()

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        rows = joined(x)
        weight, absmax, bias = weights
        assert absmax is not None
        if count_tokens(rows) <= ONE_KERNEL_TOKENS:
            return nf4_gemv(rows, weight, absmax, bias=bias, **gemv_options(before, after))
        rows = normalized(rows, before)
        y = F.linear(rows, nf4_dequantize(weight, absmax, rows.dtype), None if bias is None else bias.to(rows.dtype))
        if after is None:
            return y
        return swiglu_fused(y) if isinstance(after, SwiGLU) else after(y)

    def prepared(self, x: Tensor, before: Before) -> Tensor:
        return normalized(x, before)

    def grouped(self, x: Tensor, weights: Weights, groups: Groups, before: Before = None) -> Tensor:
        weight, absmax, _ = weights
        assert absmax is not None
        return self.dense.grouped(x, Weights(nf4_dequantize(weight, absmax, x.dtype)), groups, before)

    def add_slots(self, residual: Tensor, slots: Tensor, routes: Routes) -> Tensor:
        return self.dense.add_slots(residual, slots, routes)

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        return isinstance(after, SwiGLU) and tokens == 1


@jit
def _level(code, LEVELS: tl.constexpr):
    """The level of each code by four rounds of choosing: what the interpreter runs, having no `prmt`."""
    b0, b1, b2, b3 = (code & 1) != 0, (code & 2) != 0, (code & 4) != 0, (code & 8) != 0
    p0 = tl.where(b0, LEVELS[1], LEVELS[0])
    p1 = tl.where(b0, LEVELS[3], LEVELS[2])
    p2 = tl.where(b0, LEVELS[5], LEVELS[4])
    p3 = tl.where(b0, LEVELS[7], LEVELS[6])
    p4 = tl.where(b0, LEVELS[9], LEVELS[8])
    p5 = tl.where(b0, LEVELS[11], LEVELS[10])
    p6 = tl.where(b0, LEVELS[13], LEVELS[12])
    p7 = tl.where(b0, LEVELS[15], LEVELS[14])
    low = tl.where(b2, tl.where(b1, p3, p2), tl.where(b1, p1, p0))
    high = tl.where(b2, tl.where(b1, p7, p6), tl.where(b1, p5, p4))
    return tl.where(b3, high, low)


@jit
def _level_tables(TABLES: tl.constexpr):
    if TABLES is None:
        return (0, 0, 0, 0)
    return tl.inline_asm_elementwise(TABLES, "=r,=r,=r,=r", [], dtype=(tl.int32,) * 4, is_pure=True, pack=1)


@jit
def _levels(word, tables, PTX: tl.constexpr, LEVELS: tl.constexpr):
    if PTX is None:
        return (
            _level((word >> 4) & 15, LEVELS), _level(word & 15, LEVELS),
            _level((word >> 12) & 15, LEVELS), _level((word >> 8) & 15, LEVELS),
            _level((word >> 20) & 15, LEVELS), _level((word >> 16) & 15, LEVELS),
            _level((word >> 28) & 15, LEVELS), _level((word >> 24) & 15, LEVELS),
        )  # fmt: skip
    return asm_floats(PTX, [word, tables[0], tables[1], tables[2], tables[3]], "r,r,r,r,r")


@jit
def _floats(packed, PTX: tl.constexpr):
    bits = tl.inline_asm_elementwise(
        PTX, "=r,=r,=r,=r,=r,=r,=r,=r,r", [packed], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
    )
    return bits[0].to(tl.float32, bitcast=True), bits[1].to(tl.float32, bitcast=True)


@jit
def _nf4_dequantize(w_ptr, absmax_ptr, out_ptr, blocks, PTX: tl.constexpr, LEVELS: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    byte = tl.arange(0, 32)
    packed = tl.load(w_ptr + block[:, None] * 32 + byte[None, :], mask=inside[:, None], other=0)
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0)[:, None]
    if PTX is None:
        first, second = _level(packed >> 4, LEVELS), _level(packed & 15, LEVELS)
    else:
        first, second = _floats(packed, PTX)
    value = tl.reshape(tl.join(first * absmax, second * absmax), (BLOCKS, 64)).to(out_ptr.dtype.element_ty)
    target = out_ptr + block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(target, value, mask=inside[:, None])
