"""Weights in GGUF's blocks (`checkpoint.gguf_blocks`) by Triton: decoded at memory speed, or read once for few tokens.

Blocks lie as they are in the file, scales among the values, and in two types at even addresses only. A thread takes
what holds eight values, a "word": eight bytes of Q8_0; four of Q4_K, whose high four bits are values 32 places further;
four of Q5_K and their top bits; of Q6_K two pairs, with their top bits those of four groups of 32. So loads lie side by
side among threads, scales come from the cache, and no value changes threads before the sums at the end. Activations are
taken from the places that the word's values have.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoint.gguf_blocks import BLOCK_TYPES, decoded
from ...kernels.dependent_launch import launch_options, signal, wait
from ...kernels.elementwise import normalized, swiglu_fused
from ...kernels.gemv import MAX_ROWS, gemv_options, gemv_reference
from ...kernels.packed_gemv import WORD, Strip, added, eighths, silu
from ...kernels.triton_language import ceil_div, jit, next_power_of_2, tl
from ...ops.linear import After, Before, Dense, Product, Rows, SwiGLU, Weights, count_tokens, joined
from ...ops.routed import Groups, Routes

ONE_KERNEL_TOKENS = 2
"""Up to so many, the weight is read once; for more it is decoded for the library's matmul. As of NF4."""
DECODED_WORDS = 256
"""That a program decodes."""


@dataclass(frozen=True)
class Layout:
    """How a type's words are read. decode(bytes, shorts, ints, block, word) gives eight floats, places(word) where they
    stand among the values of a row; both in units of words of the row, and `block` a block of the weight.

    ints: whether blocks lie at multiples of four bytes.
    """

    decode: Any
    places: Any
    ints: bool


def gguf_gemv_reference(x: Tensor, weight: Tensor, kind: str, **options: Any) -> Tensor:
    """`gemv_reference` with a weight in blocks, uint8 [nbytes], decoded to float32."""
    width = x.shape[-1] // (2 if options.get("swiglu_input") else 1)
    shape = weight.numel() // BLOCK_TYPES[kind].bytes_of((width,)), width
    return gemv_reference(x, decoded(weight, kind, shape, torch.float32), **options)


def choose_strip(tokens: int, k: int, paired: bool = False) -> Strip:
    """Estimates after what NF4's kernel takes."""
    rows = 2 if tokens > 2 or paired else 4
    return Strip(rows, 128, 4) if k >= 8192 else Strip(rows, 64, 2)


def gguf_gemv(
    x: Tensor,
    weight: Tensor,
    kind: str,
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
    """Like `gguf_gemv_reference`, for at most MAX_ROWS tokens."""
    rows, block = x.reshape(-1, x.shape[-1]).contiguous(), BLOCK_TYPES[kind]
    k = rows.shape[1] // 2 if swiglu_input else rows.shape[1]
    n = weight.numel() // block.bytes_of((k,))
    tokens, n_out = rows.shape[0], n // 2 if swiglu_output else n
    assert 1 <= tokens <= MAX_ROWS, f"{tokens} tokens are too many for a one-token linear"
    assert weight.numel() == block.bytes_of((n, k)) < 2**31, "the weight's row does not fit the input"
    assert norm is None or not swiglu_input, "one prologue at a time"
    out = torch.empty(*x.shape[:-1], n_out, dtype=dtype or x.dtype, device=x.device)
    assert residual is None or (residual.shape == out.shape and residual.is_contiguous()), "the residual does not fit"
    strip = strip or choose_strip(tokens, k, swiglu_output)
    at_once, layout = min(strip.rows, next_power_of_2(n_out + 1) // 2), LAYOUTS[kind]
    _block_gemv[(ceil_div(n_out, at_once),)](
        rows, *_views(weight, layout), out, *(rows if t is None else t for t in (bias, norm, residual)), tokens, eps,
        K=k, N=n_out, PROLOGUE="rms_norm" if norm is not None else "swiglu" if swiglu_input else "none",
        PAIRED=swiglu_output, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        DECODE=layout.decode, PLACES=layout.places, BLOCK=block.values // WORD,
        TOKENS=next_power_of_2(tokens), ROWS=at_once, WORDS=strip.words, num_warps=strip.warps,
        **launch_options(x.device),
    )  # fmt: skip
    return out


def gguf_dequantize(weight: Tensor, kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`decoded` in one pass: uint8 [nbytes] -> dtype [out, in], the same bits."""
    block, layout = BLOCK_TYPES[kind], LAYOUTS[kind]
    assert weight.numel() == block.bytes_of(shape) < 2**31, "the weight does not have this shape"
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    words = out.numel() // WORD
    _block_dequantize[(ceil_div(words, DECODED_WORDS),)](
        *_views(weight, layout), out, words, DECODE=layout.decode, PLACES=layout.places, BLOCK=block.values // WORD,
        WORDS=DECODED_WORDS, num_warps=4,
    )  # fmt: skip
    return out


def _views(weight: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """The same memory as bytes, pairs and, where blocks lie so, fours."""
    assert weight.is_contiguous(), "the weight must be contiguous"
    shorts = weight.view(torch.int16)
    return weight.view(torch.int8), shorts, weight.view(torch.int32) if layout.ints else shorts


class TritonBlocks(Product):
    """One kernel up to ONE_KERNEL_TOKENS, else the weight is decoded whole for the library's matmul.

    dense: multiplies groups by decoded weights.
    """

    def __init__(self, kind: str, dense: Product | None = None) -> None:
        self.kind, self.dense = kind, dense or Dense()

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        rows = joined(x)
        if count_tokens(rows) <= ONE_KERNEL_TOKENS:
            return gguf_gemv(rows, weights.weight, self.kind, bias=weights.bias, **gemv_options(before, after))
        rows = normalized(rows, before)
        dense = self._decoded(weights.weight, rows)
        y = F.linear(rows, dense, None if weights.bias is None else weights.bias.to(rows.dtype))
        if after is None:
            return y
        return swiglu_fused(y) if isinstance(after, SwiGLU) else after(y)

    def prepared(self, x: Tensor, before: Before) -> Tensor:
        return normalized(x, before)

    def grouped(self, x: Tensor, weights: Weights, groups: Groups, before: Before = None) -> Tensor:
        rows = normalized(x, before)
        return self.dense.grouped(rows, Weights(self._decoded(weights.weight, rows)), groups)

    def add_slots(self, residual: Tensor, slots: Tensor, routes: Routes) -> Tensor:
        return self.dense.add_slots(residual, slots, routes)

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        return isinstance(after, SwiGLU) and tokens == 1

    def _decoded(self, weight: Tensor, rows: Tensor) -> Tensor:
        width = rows.shape[-1]
        shape = weight.numel() // BLOCK_TYPES[self.kind].bytes_of((width,)), width
        return gguf_dequantize(weight, self.kind, shape, rows.dtype)


@jit
def _float16(pattern):
    return pattern.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _side_by_side(word):
    """Eight values of a word stand one after another."""
    return (word * 8)[:, None] + tl.arange(0, 8)[None, :]


@jit
def _two_fours(word):
    """A word of Q4_K and Q5_K: four values, and four that stand 32 places further."""
    i = tl.arange(0, 8)[None, :]
    return (word // 8 * 64 + word % 8 * 4)[:, None] + i % 4 + i // 4 * 32


@jit
def _four_pairs(word):
    """A word of Q6_K: pairs that stand 32 places apart."""
    i = tl.arange(0, 8)[None, :]
    return (word // 16 * 128 + word % 16 * 2)[:, None] + i % 2 + i // 2 * 32


@jit
def _q8_0(bytes, shorts, ints, block, word, inside):
    place = shorts + block * 17
    d = _float16(tl.load(place, mask=inside, other=0))
    place += 1 + word * 4
    a = tl.load(place, mask=inside, other=0).to(tl.int32)
    b = tl.load(place + 1, mask=inside, other=0).to(tl.int32)
    c = tl.load(place + 2, mask=inside, other=0).to(tl.int32)
    e = tl.load(place + 3, mask=inside, other=0).to(tl.int32)
    return (
        ((a << 24) >> 24).to(tl.float32) * d, (a >> 8).to(tl.float32) * d,
        ((b << 24) >> 24).to(tl.float32) * d, (b >> 8).to(tl.float32) * d,
        ((c << 24) >> 24).to(tl.float32) * d, (c >> 8).to(tl.float32) * d,
        ((e << 24) >> 24).to(tl.float32) * d, (e >> 8).to(tl.float32) * d,
    )  # fmt: skip


@jit
def _scale_and_min(place, group, inside):
    """The scale and the min of a group of 32 values, as they meet them; `place` is the block's."""
    factors = tl.load(place, mask=inside, other=0)
    first = tl.load(place + 1, mask=inside, other=0)
    second = tl.load(place + 2, mask=inside, other=0)
    third = tl.load(place + 3, mask=inside, other=0)
    shift = group % 4 * 8
    a, b, c = first >> shift, second >> shift, third >> shift
    late = group >= 4
    scale = tl.where(late, (c & 15) | (a >> 2) & 48, a & 63)
    least = tl.where(late, (c >> 4) & 15 | (b >> 2) & 48, b & 63)
    return _float16(factors) * scale.to(tl.float32), _float16(factors >> 16) * least.to(tl.float32)


@jit
def _q4_k(bytes, shorts, ints, block, word, inside):
    place = ints + block * 36
    chunk = word // 8
    s, m = _scale_and_min(place, chunk * 2, inside)
    t, n = _scale_and_min(place, chunk * 2 + 1, inside)
    q = tl.load(place + 4 + word, mask=inside, other=0)
    return (
        s * (q & 15).to(tl.float32) - m, s * ((q >> 8) & 15).to(tl.float32) - m,
        s * ((q >> 16) & 15).to(tl.float32) - m, s * ((q >> 24) & 15).to(tl.float32) - m,
        t * ((q >> 4) & 15).to(tl.float32) - n, t * ((q >> 12) & 15).to(tl.float32) - n,
        t * ((q >> 20) & 15).to(tl.float32) - n, t * ((q >> 28) & 15).to(tl.float32) - n,
    )  # fmt: skip


@jit
def _q5_k(bytes, shorts, ints, block, word, inside):
    place = ints + block * 44
    chunk = word // 8
    s, m = _scale_and_min(place, chunk * 2, inside)
    t, n = _scale_and_min(place, chunk * 2 + 1, inside)
    q = tl.load(place + 12 + word, mask=inside, other=0)
    top = tl.load(place + 4 + word % 8, mask=inside, other=0) >> (chunk * 2)
    low = (q & 0x0F0F0F0F) | ((top & 0x01010101) << 4)
    high = ((q >> 4) & 0x0F0F0F0F) | (((top >> 1) & 0x01010101) << 4)
    return (
        s * (low & 31).to(tl.float32) - m, s * ((low >> 8) & 31).to(tl.float32) - m,
        s * ((low >> 16) & 31).to(tl.float32) - m, s * ((low >> 24) & 31).to(tl.float32) - m,
        t * (high & 31).to(tl.float32) - n, t * ((high >> 8) & 31).to(tl.float32) - n,
        t * ((high >> 16) & 31).to(tl.float32) - n, t * ((high >> 24) & 31).to(tl.float32) - n,
    )  # fmt: skip


@jit
def _q6_k(bytes, shorts, ints, block, word, inside):
    half, pair = word // 16, word % 16
    place = shorts + block * 105
    a = tl.load(place + half * 32 + pair, mask=inside, other=0).to(tl.int32)
    b = tl.load(place + half * 32 + 16 + pair, mask=inside, other=0).to(tl.int32)
    top = tl.load(place + 64 + half * 16 + pair, mask=inside, other=0).to(tl.int32)
    d = _float16(tl.load(place + 104, mask=inside, other=0))
    scales = bytes + block * 210 + 192 + half * 8 + pair // 8
    s = tl.load(scales, mask=inside, other=0).to(tl.float32) * d
    t = tl.load(scales + 2, mask=inside, other=0).to(tl.float32) * d
    u = tl.load(scales + 4, mask=inside, other=0).to(tl.float32) * d
    v = tl.load(scales + 6, mask=inside, other=0).to(tl.float32) * d
    return (
        s * (((a & 15) | (top & 3) << 4) - 32).to(tl.float32),
        s * ((((a >> 8) & 15) | ((top >> 8) & 3) << 4) - 32).to(tl.float32),
        t * (((b & 15) | ((top >> 2) & 3) << 4) - 32).to(tl.float32),
        t * ((((b >> 8) & 15) | ((top >> 10) & 3) << 4) - 32).to(tl.float32),
        u * ((((a >> 4) & 15) | ((top >> 4) & 3) << 4) - 32).to(tl.float32),
        u * ((((a >> 12) & 15) | ((top >> 12) & 3) << 4) - 32).to(tl.float32),
        v * ((((b >> 4) & 15) | ((top >> 6) & 3) << 4) - 32).to(tl.float32),
        v * ((((b >> 12) & 15) | ((top >> 14) & 3) << 4) - 32).to(tl.float32),
    )  # fmt: skip


LAYOUTS: Mapping[str, Layout] = {
    "Q8_0": Layout(_q8_0, _side_by_side, ints=False),
    "Q6_K": Layout(_q6_k, _four_pairs, ints=False),
    "Q5_K": Layout(_q5_k, _two_fours, ints=True),
    "Q4_K": Layout(_q4_k, _two_fours, ints=True),
}


@jit
def _together(w):
    """Eight of [WORDS] -> [WORDS, 8]: what `eighths` takes apart."""
    even = tl.join(tl.join(w[0], w[4]), tl.join(w[2], w[6]))
    odd = tl.join(tl.join(w[1], w[5]), tl.join(w[3], w[7]))
    return tl.reshape(tl.join(even, odd), (w[0].shape[0], 8))


@jit
def _block_dequantize(
    bytes_ptr, shorts_ptr, ints_ptr, out_ptr, words,
    DECODE: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = at < words
    value = _together(DECODE(bytes_ptr, shorts_ptr, ints_ptr, at // BLOCK, at % BLOCK, inside))
    tl.store(out_ptr + PLACES(at), value.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@jit
def _block_gemv(
    x_ptr, bytes_ptr, shorts_ptr, ints_ptr, out_ptr, bias_ptr, norm_ptr, residual_ptr, tokens, eps,
    K: tl.constexpr, N: tl.constexpr, PROLOGUE: tl.constexpr, PAIRED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DECODE: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    signal(OVERLAP)
    SPAN: tl.constexpr = K // 8
    HALVES: tl.constexpr = 2 if PAIRED else 1
    # The last program takes whole rows too, some of them a second time.
    first = tl.minimum(tl.program_id(0) * ROWS, N - ROWS)
    row = tl.arange(0, ROWS * HALVES)
    row = first + row % ROWS + row // ROWS * N
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row).to(tl.float32)
    wait(OVERLAP)

    token = tl.arange(0, TOKENS)
    known = (token < tokens)[:, None, None]
    target = token[:, None] * N + (first + tl.arange(0, ROWS))[None, :]
    width: tl.constexpr = 2 * K if PROLOGUE == "swiglu" else K
    total = tl.zeros((TOKENS, WORDS, ROWS * HALVES), dtype=tl.float32)
    squares = tl.zeros((TOKENS, WORDS, 8), dtype=tl.float32)
    for start in tl.range(0, SPAN, WORDS, num_stages=1):
        at = start + tl.arange(0, WORDS)
        inside = at < SPAN
        block = (row * (SPAN // BLOCK))[None, :] + (at // BLOCK)[:, None]
        w = DECODE(bytes_ptr, shorts_ptr, ints_ptr, block, (at % BLOCK)[:, None], inside[:, None])
        depth = PLACES(at)
        there = known & inside[None, :, None]
        source = x_ptr + token[:, None, None] * width + depth[None, :, :]
        x = tl.load(source, mask=there, other=0).to(tl.float32)
        if PROLOGUE == "rms_norm":
            squares += x * x
            x *= tl.load(norm_ptr + depth, mask=inside[:, None], other=0).to(tl.float32)[None, :, :]
        elif PROLOGUE == "swiglu":
            x = silu(x) * tl.load(source + K, mask=there, other=0).to(tl.float32)
        total = added(total, w, eighths(x))

    y = tl.sum(total, axis=1)
    if PROLOGUE == "rms_norm":
        y = y / tl.sqrt(tl.sum(tl.sum(squares, axis=2), axis=1) / K + eps)[:, None]
    if HAS_BIAS:
        y += bias[None, :]
    if PAIRED:
        gate, up = tl.split(tl.permute(tl.reshape(y, (TOKENS, 2, ROWS)), (0, 2, 1)))
        y = silu(gate) * up
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + target, mask=(token < tokens)[:, None], other=0).to(tl.float32)
    tl.store(out_ptr + target, y.to(out_ptr.dtype.element_ty), mask=(token < tokens)[:, None])
