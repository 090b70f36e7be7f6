"""NF4 weights (stored as `quant.nf4` says): dequantised at memory speed, or read once for one to eight tokens.

There is no time for a table in memory: at memory speed a multiprocessor must decode over 30 values a cycle. On CUDA the
levels are looked up byte by byte, four codes at a time, with the byte permutation instruction, `prmt`, whose table is a
pair of registers: two tables of eight for each byte of a level, chosen between by the code's top bit.

Dequantising looks up the four bytes of a float32, exactly. The one-token kernel looks up two, the 15 mantissa bits u of
a float32 f = 1 + u / 2^15 in [1, 2), and puts them beside 0x3F, which makes a float without any conversion;
v = (f - 1.5) * SPREAD, and levels are off by at most 2^-15, a thousandth of the distance between two.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..quant.linear import QuantMatmul
from ..quant.nf4 import BLOCK, CODEBOOK, dequantize
from .fused import rms_norm_fused, swiglu_fused
from .gemv import MAX_ROWS, finish, gemv_reference, silu, store_output
from .triton_language import ceil_div, interpreted, jit, next_power_of_2, tl

SPREAD = 1 / (0.5 - 2**-15)
"""Brings level 1.0 to the largest f below 2."""


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
def mantissa_ptx() -> str:
    """The one-token kernel's decoding: f in [1, 2) of each code."""
    codes = [round((0.5 + level / SPREAD) * 2**15) for level in CODEBOOK]
    # The high byte's top bit is the last bit of the exponent of numbers in [1, 2).
    planes = {"p1": [code & 0xFF for code in codes], "p2": [0x80 | code >> 8 for code in codes]}

    def half(codes: str, outputs: list[str]) -> list[str]:
        lines = [*_look_up(codes, planes), "prmt.b32 a, p1, p2, 0x5140;", "prmt.b32 b, p1, p2, 0x7362;"]
        for output, pair, order in zip(outputs, "aabb", ("0x5104", "0x5324") * 2, strict=True):
            lines.append(f"prmt.b32 {output}, {pair}, 0x3f00, {order};")
        return lines

    return _decode(half)


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


@dataclass(frozen=True)
class Nf4Strip:
    """How a program reads the weight: `rows` of W at a time, `blocks` blocks of 64 values of each row per step."""

    rows: int
    blocks: int
    warps: int
    stages: int


def choose_strip(tokens: int, n: int, k: int, paired: bool = False) -> Nf4Strip:
    """For one token the best that `python -m lowmem_bagel.benchmarks.kernels --tune` found on an H200; for more,
    estimates."""
    if tokens <= 2:
        return Nf4Strip(8 if paired else 16, 8, 4, 3) if max(n, k) >= 16384 else Nf4Strip(4, 4, 4, 1)
    return Nf4Strip(4, 8, 4, 2)


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
    strip: Nf4Strip | None = None,
) -> Tensor:
    """Like `nf4_gemv_reference`, for at most MAX_ROWS tokens."""
    n, k = weight.shape[0], 2 * weight.shape[1]
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, n_out = rows.shape[0], n // 2 if swiglu_output else n
    assert 1 <= tokens <= MAX_ROWS, f"{tokens} tokens are too many for a one-token linear"
    assert rows.shape[1] == (2 * k if swiglu_input else k), "the weight's row does not fit the input"
    assert absmax.numel() * BLOCK == n * k, "absmax does not fit the weight"
    assert weight.is_contiguous(), "the weight must be contiguous"
    assert norm is None or not swiglu_input, "one prologue at a time"
    out = torch.empty(*x.shape[:-1], n_out, dtype=dtype or x.dtype, device=x.device)
    assert residual is None or (residual.shape == out.shape and residual.is_contiguous()), "the residual does not fit"
    strip = strip or choose_strip(tokens, n, k, swiglu_output)
    _nf4_gemv[(ceil_div(n_out, strip.rows),)](
        rows, weight, absmax, out, *(rows if t is None else t for t in (bias, norm, residual)), tokens, n_out, eps,
        K=k, PROLOGUE="rms_norm" if norm is not None else "swiglu" if swiglu_input else "none", PAIRED=swiglu_output,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        EVEN=k % (BLOCK * strip.blocks) == 0 and n_out % strip.rows == 0,
        TOKENS=next_power_of_2(tokens), ROWS=strip.rows, BLOCKS=strip.blocks, STAGES=strip.stages,
        PTX=None if interpreted() else mantissa_ptx(), LEVELS=CODEBOOK if interpreted() else None, SPREAD=SPREAD,
        num_warps=strip.warps,
    )  # fmt: skip
    return out


def nf4_dequantize(weight: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """`quant.nf4.dequantize` in one pass: uint8 [N, K / 2], float32 [N, K / 64] -> dtype [N, K], the same bits."""
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


class TritonNf4(QuantMatmul):
    """NF4 linears: one-token kernel up to MAX_ROWS tokens, else dequantised whole, then the library's matmul."""

    activates = True

    def matmul(self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() <= MAX_ROWS * x.shape[-1]:
            return nf4_gemv(x, weight, scales, bias=bias)
        dense = nf4_dequantize(weight, scales, x.dtype)
        return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))

    def after_rmsnorm(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        if x.numel() <= MAX_ROWS * x.shape[-1]:
            return nf4_gemv(x, weight, scales, bias=bias, norm=norm, eps=eps, dtype=norm.dtype)
        return self.matmul(rms_norm_fused(x, norm, eps), weight, scales, bias)

    def after_swiglu(self, gate_up: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if gate_up.numel() <= MAX_ROWS * gate_up.shape[-1]:
            return nf4_gemv(gate_up, weight, scales, bias=bias, swiglu_input=True)
        return self.matmul(swiglu_fused(gate_up), weight, scales, bias)

    def activated(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        if x.numel() <= MAX_ROWS * x.shape[-1]:
            return nf4_gemv(x, weight, scales, bias=bias, norm=norm, eps=eps, swiglu_output=True, dtype=norm.dtype)
        return swiglu_fused(self.after_rmsnorm(x, norm, eps, weight, scales, bias))

    def added(self, residual: Tensor, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if x.numel() <= MAX_ROWS * x.shape[-1]:
            return nf4_gemv(x, weight, scales, bias=bias, residual=residual)
        return super().added(residual, x, weight, scales, bias)


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


@jit
def _pair_product(
    w_ptr, absmax_ptr, row, start, even, odd, n, K: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    PTX: tl.constexpr, LEVELS: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """[TOKENS, ROWS, BLOCKS, 32]: each packed byte's two values times their activations (even, odd: like it)."""
    block = start + tl.arange(0, BLOCKS)
    byte = start * 32 + tl.arange(0, BLOCKS * 32)
    source = w_ptr + row[:, None] * (K // 2) + byte[None, :]
    scale = absmax_ptr + row[:, None] * (K // 64) + block[None, :]
    if EVEN:
        packed = tl.load(source, eviction_policy="evict_first")
        absmax = tl.load(scale, eviction_policy="evict_first")
    else:
        inside = (row < n)[:, None]
        packed = tl.load(source, mask=inside & (byte < K // 2)[None, :], other=0, eviction_policy="evict_first")
        absmax = tl.load(scale, mask=inside & (block < K // 64)[None, :], other=0, eviction_policy="evict_first")
    # Reshaped, not indexed with None: that keeps the layout of the load, sixteen bytes to a thread.
    packed = tl.reshape(packed, (1, row.shape[0], BLOCKS, 32))
    if PTX is None:
        product = _level(packed >> 4, LEVELS) * even + _level(packed & 15, LEVELS) * odd
        return product * absmax[None, :, :, None]
    first, second = _floats(packed, PTX)
    product = first * even + (second * odd - 1.5 * (even + odd))
    return product * (absmax * SPREAD)[None, :, :, None]


@jit
def _input_pairs(x_ptr, norm_ptr, token, block, tokens, K: tl.constexpr, PROLOGUE: tl.constexpr, EVEN: tl.constexpr):
    """The prologue's values for each packed byte, [TOKENS, 1, BLOCKS, 32] twice, and the sum of raw squares."""
    width: tl.constexpr = 2 * K if PROLOGUE == "swiglu" else K
    BLOCKS: tl.constexpr = block.shape[0]
    TOKENS: tl.constexpr = token.shape[0]
    depth = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    inside = (token < tokens)[:, None, None] & (depth < K)[None, :, :]
    source = x_ptr + token[:, None, None] * width + depth[None, :, :]
    raw = tl.load(source, mask=inside, other=0).to(tl.float32)
    value = raw
    if PROLOGUE == "swiglu":
        value = silu(raw) * tl.load(source + K, mask=inside, other=0).to(tl.float32)
    elif PROLOGUE == "rms_norm":
        value = raw * tl.load(norm_ptr + depth, mask=depth < K, other=0).to(tl.float32)[None, :, :]
    even, odd = tl.split(tl.reshape(value, (TOKENS, 1, BLOCKS, 32, 2)))
    return even, odd, raw * raw


@jit
def _nf4_gemv(
    x_ptr, w_ptr, absmax_ptr, out_ptr, bias_ptr, norm_ptr, residual_ptr, tokens, n, eps,
    K: tl.constexpr, PROLOGUE: tl.constexpr, PAIRED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
    PTX: tl.constexpr, LEVELS: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    token = tl.arange(0, TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((TOKENS, ROWS, BLOCKS, 32), dtype=tl.float32)
    paired = tl.zeros((TOKENS, ROWS, BLOCKS, 32), dtype=tl.float32)
    squares = tl.zeros((TOKENS, BLOCKS, 64), dtype=tl.float32)
    for start in tl.range(0, K // 64, BLOCKS, num_stages=STAGES):
        block = start + tl.arange(0, BLOCKS)
        even, odd, square = _input_pairs(x_ptr, norm_ptr, token, block, tokens, K, PROLOGUE, EVEN)
        acc += _pair_product(w_ptr, absmax_ptr, row, start, even, odd, n, K, BLOCKS, EVEN, PTX, LEVELS, SPREAD)
        if PAIRED:
            up_ptr, up_absmax_ptr = w_ptr + n * (K // 2), absmax_ptr + n * (K // 64)
            paired += _pair_product(
                up_ptr, up_absmax_ptr, row, start, even, odd, n, K, BLOCKS, EVEN, PTX, LEVELS, SPREAD
            )
        if PROLOGUE == "rms_norm":
            squares += square
    square = tl.sum(tl.sum(squares, axis=2), axis=1)
    total = tl.sum(tl.sum(acc, axis=3), axis=2)
    value = finish(total, square, bias_ptr, bias_ptr, row, n, K, eps, PROLOGUE, False, HAS_BIAS)
    if PAIRED:
        total = tl.sum(tl.sum(paired, axis=3), axis=2)
        up = finish(total, square, bias_ptr, bias_ptr + n, row, n, K, eps, PROLOGUE, False, HAS_BIAS)
        value = silu(value) * up
    store_output(value, out_ptr, residual_ptr, token, row, tokens, n, HAS_RESIDUAL)
