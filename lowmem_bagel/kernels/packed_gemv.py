"""Linears on one to eight tokens with INT8 or NF4 weights, as fast as the weight can be read.

    y = prologue(x) @ W.T + bias + residual, or silu(gate) * up of that without the residual

A thread takes eight weights at a time, one machine word, and the eight activations that belong to them (16 bytes in
half precision). So loads need nothing in common with their neighbours' but to lie side by side, and no value changes
threads before the sums at the end. What a word holds is a `Code`'s matter. Products and sums are float32.

On compute capability 9 the next kernel starts while this one runs (`dependent_launch`), loads its first weights, and
only then waits for its input.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dependent_launch import launch_options, signal, wait
from .triton_language import ceil_div, jit, next_power_of_2, tl

WORD = 8
"""Weights in a word."""


@dataclass(frozen=True)
class Strip:
    """How a program reads the weight: `words` of each of `rows` rows at a time (of twice as many with SwiGLU)."""

    rows: int
    words: int
    warps: int
    registers: int | None = None
    """Of a thread, at most; None leaves it to the assembler, which may spill some for more programs at a time."""


@dataclass(frozen=True)
class Code:
    """What a word of eight weights means: weight i is scale * down * (up * value i - shift), where the values are what
    `decode(word, tables, ptx, levels)` returns. x takes the factor `up` before it meets them: they may be denormal.

    prepare: `prepare(tables)` makes the tables, once a program. block: weights to a scale; None: a row has one scale.
    """

    decode: Any
    prepare: Any
    block: int | None = None
    ptx: str | None = None
    tables: str | None = None
    levels: Sequence[float] | None = None
    up: float = 1.0
    down: float = 1.0
    shift: float = 0.0


MOST_REGISTERS = 255
"""That a thread can have."""


def choose_strip(tokens: int, n: int, k: int, block: int | None, paired: bool = False) -> Strip:
    """For one token the best found in a chain of BAGEL-7B's linears on an H200; for more, the best of a few tried."""
    if tokens > 2:  # of eight tokens by two rows' gates and ups in NF4 not all fits in a thread
        return Strip(1 if tokens > 4 and paired and block is not None else 2, 64, 2, MOST_REGISTERS)
    if tokens == 2:
        registers = MOST_REGISTERS if block is None else None
        return Strip(4, 128, 4, registers) if k >= 8192 else Strip(4, 64, 2, registers)
    if n >= 16384:
        return Strip(4, 64, 1) if block is None else Strip(8, 64, 2)
    if k >= 8192:  # many warps a row: few programs, each with much in flight
        return Strip(8 if block is None else 4, 256, 8)
    if block is None:
        return Strip(4, 128 if n > 4096 else 256, 4)
    return Strip(4, 512, 4)


def packed_gemv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    code: Code,
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
    """`gemv.gemv_reference` with weight [N, K / 8] of words, and scale float32 [N] or [N, K / code.block]."""
    n, k = weight.shape[0], weight.shape[1] * WORD
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, n_out = rows.shape[0], n // 2 if swiglu_output else n
    assert rows.shape[1] == (2 * k if swiglu_input else k), "the weight's row does not fit the input"
    assert weight.is_contiguous(), "the weight must be contiguous"
    assert weight.numel() < 2**31, "the kernel counts words in 32 bits"
    assert scale.numel() == (n if code.block is None else n * k // code.block), "the scales do not fit the weight"
    assert norm is None or not swiglu_input, "one prologue at a time"
    out = torch.empty(*x.shape[:-1], n_out, dtype=dtype or x.dtype, device=x.device)
    assert residual is None or (residual.shape == out.shape and residual.is_contiguous()), "the residual does not fit"
    strip = strip or choose_strip(tokens, n, k, code.block, swiglu_output)
    at_once = min(strip.rows, next_power_of_2(n_out + 1) // 2)
    _packed_gemv[(ceil_div(n_out, at_once),)](
        rows, weight, scale, out, *(rows if t is None else t for t in (bias, norm, residual)), tokens, eps,
        K=k, N=n_out, PROLOGUE="rms_norm" if norm is not None else "swiglu" if swiglu_input else "none",
        PAIRED=swiglu_output, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        BLOCK=code.block, DECODE=code.decode, PREPARE=code.prepare, PTX=code.ptx, TABLES=code.tables,
        LEVELS=code.levels, UP=code.up, DOWN=code.down, SHIFT=code.shift,
        TOKENS=next_power_of_2(tokens), ROWS=at_once, WORDS=strip.words, num_warps=strip.warps,
        **({} if strip.registers is None else {"maxnreg": strip.registers}), **launch_options(x.device),
    )  # fmt: skip
    return out


@jit
def silu(x):
    return x / (1 + tl.exp(-x))


@jit
def asm_floats(PTX: tl.constexpr, words, REGISTERS: tl.constexpr):
    """Eight floats a word by inline assembly; REGISTERS: the constraints of what it reads."""
    return tl.inline_asm_elementwise(
        PTX, "=f,=f,=f,=f,=f,=f,=f,=f," + REGISTERS, words,
        dtype=(tl.float32,) * 8, is_pure=True, pack=1,
    )  # fmt: skip


@jit
def _load(place, inside, MASKED: tl.constexpr, FILL: tl.constexpr):
    """Without FILL, what lies outside is left to chance, which costs nothing; it must meet a zero."""
    if not MASKED:
        return tl.load(place)
    if FILL:
        return tl.load(place, mask=inside, other=0)
    return tl.load(place, mask=inside)


@jit
def eighths(x):
    """[TOKENS, WORDS, 8] -> eight of [TOKENS, WORDS, 1]."""
    x = tl.reshape(x, (x.shape[0], x.shape[1], 1, 2, 2, 2))
    even, odd = tl.split(x)
    x04, x26 = tl.split(even)
    x15, x37 = tl.split(odd)
    x0, x4 = tl.split(x04)
    x2, x6 = tl.split(x26)
    x1, x5 = tl.split(x15)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@jit
def added(total, w, x):
    """total [TOKENS, WORDS, ROWS] and, one after another, the products of a word's weights w and activations x."""
    total += w[0][None, :, :] * x[0]
    total += w[1][None, :, :] * x[1]
    total += w[2][None, :, :] * x[2]
    total += w[3][None, :, :] * x[3]
    total += w[4][None, :, :] * x[4]
    total += w[5][None, :, :] * x[5]
    total += w[6][None, :, :] * x[6]
    total += w[7][None, :, :] * x[7]
    return total


@jit
def _packed_gemv(
    x_ptr, w_ptr, scale_ptr, out_ptr, bias_ptr, norm_ptr, residual_ptr, tokens, eps,
    K: tl.constexpr, N: tl.constexpr, PROLOGUE: tl.constexpr, PAIRED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, DECODE: tl.constexpr, PREPARE: tl.constexpr, PTX: tl.constexpr, TABLES: tl.constexpr,
    LEVELS: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, SHIFT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    signal(OVERLAP)
    SPAN: tl.constexpr = K // 8
    EVEN: tl.constexpr = SPAN % WORDS == 0
    HALVES: tl.constexpr = 2 if PAIRED else 1
    # The last program takes whole rows too, some of them a second time.
    first = tl.minimum(tl.program_id(0) * ROWS, N - ROWS)
    word = tl.arange(0, WORDS)
    # Known to the compiler as distances from the first row: those are part of the load instruction.
    row = tl.arange(0, ROWS * HALVES)
    row = row % ROWS + row // ROWS * N
    # One word to a thread, so that it meets its eight activations.
    place = w_ptr + first * SPAN + tl.max_contiguous(word, 1)
    inside = (word < SPAN)[:, None]
    w = _load(place[:, None] + (row * SPAN)[None, :], inside, not EVEN, False)
    if BLOCK is None:
        scale = tl.load(scale_ptr + first + row)
    else:
        scale_place = scale_ptr + first * (K // BLOCK) + word // (BLOCK // 8)
        scale = _load(scale_place[:, None] + (row * (K // BLOCK))[None, :], inside, not EVEN, True)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first + row).to(tl.float32)
    tables = PREPARE(TABLES)
    wait(OVERLAP)

    token = tl.arange(0, TOKENS)
    known = (token < tokens)[:, None, None]
    target = token[:, None] * N + (first + tl.arange(0, ROWS))[None, :]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + target, mask=(token < tokens)[:, None], other=0).to(tl.float32)
    width: tl.constexpr = 2 * K if PROLOGUE == "swiglu" else K
    column = (word * 8)[:, None] + tl.arange(0, 8)[None, :]
    total = tl.zeros((TOKENS, WORDS, ROWS * HALVES), dtype=tl.float32)
    squares = tl.zeros((TOKENS, WORDS, 8), dtype=tl.float32)
    shifts = tl.zeros((TOKENS, WORDS, 1), dtype=tl.float32)
    for start in tl.range(0, SPAN, WORDS, num_stages=1):
        depth = start * 8 + column
        there = known & (depth < K)[None, :, :]
        source = x_ptr + token[:, None, None] * width + depth[None, :, :]
        x = tl.load(source, mask=there, other=0).to(tl.float32)
        if PROLOGUE == "rms_norm":
            squares += x * x
            x *= tl.load(norm_ptr + depth, mask=depth < K, other=0).to(tl.float32)[None, :, :]
        elif PROLOGUE == "swiglu":
            x = silu(x) * tl.load(source + K, mask=there, other=0).to(tl.float32)
        shift = tl.sum(x, axis=2)[:, :, None] * SHIFT
        if SPAN > WORDS:
            place += WORDS
            # The same for all threads where it can be.
            more = start + WORDS < SPAN if EVEN else (start + WORDS + word < SPAN)[:, None]
            next_w = _load(place[:, None] + (row * SPAN)[None, :], more, True, False)
        if BLOCK is None:
            total = added(total, DECODE(w, tables, PTX, LEVELS), eighths(x * UP))
            shifts += shift
        else:
            if SPAN > WORDS:
                scale_place += WORDS // (BLOCK // 8)
                next_scale = _load(scale_place[:, None] + (row * (K // BLOCK))[None, :], more, True, not EVEN)
            part = tl.broadcast_to(-shift, (TOKENS, WORDS, ROWS * HALVES))
            total += added(part, DECODE(w, tables, PTX, LEVELS), eighths(x * UP)) * scale[None, :, :]
            if SPAN > WORDS:
                scale = next_scale
        if SPAN > WORDS:
            w = next_w

    y = tl.sum(total, axis=1) * DOWN
    if BLOCK is None:
        y = (y - tl.sum(shifts, axis=1) * DOWN) * scale[None, :]
    if PROLOGUE == "rms_norm":
        y = y / tl.sqrt(tl.sum(tl.sum(squares, axis=2), axis=1) / K + eps)[:, None]
    if HAS_BIAS:
        y += bias[None, :]
    if PAIRED:
        gate, up = tl.split(tl.permute(tl.reshape(y, (TOKENS, 2, ROWS)), (0, 2, 1)))
        y = silu(gate) * up
    if HAS_RESIDUAL:
        y += residual
    tl.store(out_ptr + target, y.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None])
