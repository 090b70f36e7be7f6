"""Linears on one to eight tokens, which take as long as reading the weight: it is read once, at memory speed.

    y = prologue(x) @ W.T * scale + bias + residual

W is a float weight, or int8 with a float32 scale per row, for which `packed_gemv` does the work where eight weights
make a word; products and sums are float32, and the activation is never quantised. The prologue (RMSNorm or SwiGLU of
the input) is computed by every program for itself. RMSNorm needs no pass of its own: the sum of squares is taken
along with the product, and the result is divided by the norm at the end.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..ops.linear import Add, After, Before, RMSNorm, SwiGLU, rms_norm, swiglu
from .dependent_launch import launch_options, signal, wait
from .packed_gemv import WORD, Code, asm_floats, packed_gemv, silu
from .triton_language import ceil_div, interpreted, jit, next_power_of_2, tl

MAX_ROWS = 8
"""Most tokens: beyond, tensor cores pay."""


@dataclass(frozen=True)
class Strip:
    """How a program reads the weight: `rows` of W at a time, `depth` values of each row per step."""

    rows: int
    depth: int
    warps: int
    stages: int


def choose_strip(tokens: int, n: int, itemsize: int, paired: bool = False) -> Strip:
    """Estimates."""
    rows = 8 if n >= 16384 and tokens == 1 and not paired else 4
    depth = 1024 // itemsize if tokens <= 2 else 512 // itemsize
    return Strip(rows, depth, 4, 3)


def gemv_reference(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu_input: bool = False,
    swiglu_output: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x [..., K] (2K wide with swiglu_input), weight [N, K] float or int8 -> [..., N] in `dtype` (default: x's).

    scale: float32 [N]; bias: [N]; norm: the RMSNorm weight [K] to apply to x first; swiglu_input: x is [gate | up];
    swiglu_output: the result is [gate | up], of which silu(gate) * up [..., N / 2] is returned;
    residual: added at the end, of the result's shape. Computed in float32 throughout.
    """
    wide = x.float()
    if norm is not None:
        wide = rms_norm(wide, norm.float(), eps)
    if swiglu_input:
        wide = swiglu(wide)
    y = wide @ weight.float().T
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias.float()
    y = swiglu(y) if swiglu_output else y
    y = y if residual is None else y + residual.float()
    return y.to(dtype or x.dtype)


def gemv_options(before: Before, after: After) -> dict[str, Any]:
    """What a one-token kernel is told of what stands around its product."""
    options: dict[str, Any] = {"swiglu_input": isinstance(before, SwiGLU), "swiglu_output": isinstance(after, SwiGLU)}
    if isinstance(before, RMSNorm):
        options |= {"norm": before.weight, "eps": before.eps, "dtype": before.weight.dtype}
    return options | ({"residual": after.residual} if isinstance(after, Add) else {})


def gemv(
    x: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    swiglu_input: bool = False,
    swiglu_output: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
    strip: Strip | None = None,
) -> Tensor:
    """Like `gemv_reference`, for at most MAX_ROWS tokens."""
    n, k = weight.shape
    if weight.dtype is torch.int8 and scale is not None and k % WORD == 0 and strip is None:
        return packed_gemv(
            x, weight.view(torch.int64), scale, int8_weights(), bias=bias, norm=norm, eps=eps,
            swiglu_input=swiglu_input, swiglu_output=swiglu_output, residual=residual, dtype=dtype,
        )  # fmt: skip
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    tokens, n_out = rows.shape[0], n // 2 if swiglu_output else n
    assert 1 <= tokens <= MAX_ROWS, f"{tokens} tokens are too many for a one-token linear"
    assert rows.shape[1] == (2 * k if swiglu_input else k), "the weight's row does not fit the input"
    assert weight.is_contiguous(), "the weight must be contiguous"
    assert weight.numel() < 2**31, "the kernel counts values in 32 bits"
    assert norm is None or not swiglu_input, "one prologue at a time"
    out = torch.empty(*x.shape[:-1], n_out, dtype=dtype or x.dtype, device=x.device)
    assert residual is None or (residual.shape == out.shape and residual.is_contiguous()), "the residual does not fit"
    strip = strip or choose_strip(tokens, n, weight.element_size(), swiglu_output)
    _gemv[(ceil_div(n_out, strip.rows),)](
        rows, weight, out, *(rows if t is None else t for t in (scale, bias, norm, residual)), tokens, n_out, eps,
        K=k,
        PROLOGUE="rms_norm" if norm is not None else "swiglu" if swiglu_input else "none", PAIRED=swiglu_output,
        HAS_SCALE=scale is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        EVEN=k % strip.depth == 0 and n_out % strip.rows == 0,
        TOKENS=next_power_of_2(tokens), ROWS=strip.rows, DEPTH=strip.depth, STAGES=strip.stages,
        num_warps=strip.warps, **launch_options(x.device),
    )  # fmt: skip
    return out


@cache
def int8_weights() -> Code:
    """Eight int8 in a word.

    Converting them takes an instruction that a GPU executes four times slower than others, so a byte is put where it is
    the mantissa of a denormal float: b + 128 = u becomes u * 2^16 * 2^-149, by one byte permutation and exactly.
    """
    if interpreted():
        return Code(_integers, _no_tables)
    lines = [".reg .b32 low, high;", "mov.b64 {low, high}, $8;"]
    lines += [f"xor.b32 {half}, {half}, 0x80808080;" for half in ("low", "high")]
    for i in range(WORD):
        lines.append(f"prmt.b32 ${i}, {'low' if i < 4 else 'high'}, 0, {0x4044 | i % 4 << 8:#x};")
    up = 2.0**64
    value = 2.0 ** (16 - 149)
    ptx = "\n".join(("{", *lines, "}"))
    return Code(_integers, _no_tables, ptx=ptx, up=up, down=1 / (up * value), shift=128 * up * value)


@jit
def _no_tables(TABLES: tl.constexpr):
    return (0,)


@jit
def _integers(word, tables, PTX: tl.constexpr, LEVELS: tl.constexpr):
    if PTX is None:
        return (
            word.to(tl.int8).to(tl.float32), (word >> 8).to(tl.int8).to(tl.float32),
            (word >> 16).to(tl.int8).to(tl.float32), (word >> 24).to(tl.int8).to(tl.float32),
            (word >> 32).to(tl.int8).to(tl.float32), (word >> 40).to(tl.int8).to(tl.float32),
            (word >> 48).to(tl.int8).to(tl.float32), (word >> 56).to(tl.int8).to(tl.float32),
        )  # fmt: skip
    return asm_floats(PTX, [word], "l")


@jit
def input_values(x_ptr, norm_ptr, token, depth, tokens, k, PROLOGUE: tl.constexpr):
    """The prologue's values [TOKENS, DEPTH] before division by the norm, and the raw ones to sum the squares of."""
    width = 2 * k if PROLOGUE == "swiglu" else k
    inside = (token < tokens)[:, None] & (depth < k)[None, :]
    source = x_ptr + token[:, None] * width + depth[None, :]
    raw = tl.load(source, mask=inside, other=0).to(tl.float32)
    if PROLOGUE == "swiglu":
        value = silu(raw) * tl.load(source + k, mask=inside, other=0).to(tl.float32)
    elif PROLOGUE == "rms_norm":
        value = raw * tl.load(norm_ptr + depth, mask=depth < k, other=0).to(tl.float32)[None, :]
    else:
        value = raw
    return value, raw


@jit
def finish(
    total, square, scale_ptr, bias_ptr, row, n, k, eps,
    PROLOGUE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """total [TOKENS, ROWS] divided by the norm (square [TOKENS]: sums of squares), scaled, with the bias."""
    if PROLOGUE == "rms_norm":
        total = total / tl.sqrt(square / k + eps)[:, None]
    if HAS_SCALE:
        total *= tl.load(scale_ptr + row, mask=row < n, other=0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + row, mask=row < n, other=0).to(tl.float32)[None, :]
    return total


@jit
def store_output(value, out_ptr, residual_ptr, token, row, tokens, n, HAS_RESIDUAL: tl.constexpr):
    inside = (token < tokens)[:, None] & (row < n)[None, :]
    place = token[:, None] * n + row[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual_ptr + place, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _weight_rows(w_ptr, row, depth, n, k, EVEN: tl.constexpr):
    source = w_ptr + row[:, None] * k + depth[None, :]
    if EVEN:
        w = tl.load(source, eviction_policy="evict_first")
    else:
        w = tl.load(source, mask=(row < n)[:, None] & (depth < k)[None, :], other=0, eviction_policy="evict_first")
    # Reshaped, not indexed with None: that keeps the layout of the load, sixteen bytes to a thread.
    return tl.reshape(w.to(tl.float32), (1, w.shape[0], w.shape[1]))


@jit
def _gemv(
    x_ptr, w_ptr, out_ptr, scale_ptr, bias_ptr, norm_ptr, residual_ptr, tokens, n, eps,
    K: tl.constexpr, PROLOGUE: tl.constexpr, PAIRED: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    signal(OVERLAP)
    wait(OVERLAP)  # for the weight too, which the kernel before may just have decoded
    token = tl.arange(0, TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((TOKENS, ROWS, DEPTH), dtype=tl.float32)
    paired = tl.zeros((TOKENS, ROWS, DEPTH), dtype=tl.float32)
    squares = tl.zeros((TOKENS, DEPTH), dtype=tl.float32)
    for start in tl.range(0, K, DEPTH, num_stages=STAGES):
        depth = start + tl.arange(0, DEPTH)
        x, raw = input_values(x_ptr, norm_ptr, token, depth, tokens, K, PROLOGUE)
        acc += x[:, None, :] * _weight_rows(w_ptr, row, depth, n, K, EVEN)
        if PAIRED:
            paired += x[:, None, :] * _weight_rows(w_ptr + n * K, row, depth, n, K, EVEN)
        if PROLOGUE == "rms_norm":
            squares += raw * raw
    square = tl.sum(squares, axis=1)
    value = finish(tl.sum(acc, axis=2), square, scale_ptr, bias_ptr, row, n, K, eps, PROLOGUE, HAS_SCALE, HAS_BIAS)
    if PAIRED:
        up = finish(
            tl.sum(paired, axis=2), square, scale_ptr + n, bias_ptr + n, row, n, K, eps, PROLOGUE, HAS_SCALE, HAS_BIAS
        )
        value = silu(value) * up
    store_output(value, out_ptr, residual_ptr, token, row, tokens, n, HAS_RESIDUAL)
