"""What stands between two matmuls, in one pass over memory: norms, SwiGLU, and the quantisation of activations; and
between the last of a token and the first of the next, the choice of that token.

Quantisation is per token (row): the arithmetic of INT8, to the bit where what precedes it has the same bits. A NaN or
an infinity makes the scale NaN or infinite, so that it stays visible in the product.

Norms and SwiGLU round where `ops.linear` rounds (after the norm, after the product with its weight; after silu), so
that a fused quantisation sees the very activations that the unfused one would see.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from functools import partial

import torch
from torch import Tensor

from ..ops.int8 import quantize_rows
from ..ops.linear import Before, RMSNorm, Rows, SwiGLU, count_tokens, joined, rms_norm, swiglu
from .dependent_launch import launch_options, signal, wait
from .triton_language import ceil_div, jit, next_power_of_2, tl

MAX_WIDTH = 65536
"""Longest row that a program is asked to hold in registers."""
STRETCH = 1024
"""Logits that a program chooses among."""
LEAST_SCALE, LIFT = tl.constexpr(2.0**-60), tl.constexpr(2.0**64)
"""Below which scale rows are multiplied by how much before they are divided by it."""

Quantized = tuple[Tensor, Tensor]
"""int8 [rows, K] and the float32 scale of each row [rows]."""


def quantize_reference(x: Tensor) -> Quantized:
    """x: [..., K], any float dtype -> int8 [rows, K], float32 [rows]."""
    values, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    return values, scale.squeeze(-1)


def quantize(x: Tensor) -> Quantized:
    """Like `quantize_reference`."""
    return _quantize(x, None, 0.0)


def rms_norm_quantize_reference(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    """quantize(rms_norm(x, weight, eps)); x: [..., K], weight: [K]."""
    return quantize_reference(rms_norm(x, weight, eps))


def rms_norm_quantize(x: Tensor, weight: Tensor, eps: float) -> Quantized:
    """Like `rms_norm_quantize_reference`."""
    return _quantize(x, weight, eps)


def swiglu_quantize_reference(gate_up: Tensor) -> Quantized:
    """quantize(silu(gate) * up); gate_up: [..., gate | up], 2 * K wide."""
    return quantize_reference(swiglu(gate_up))


def swiglu_quantize(gate_up: Tensor) -> Quantized:
    """Like `swiglu_quantize_reference`."""
    rows, width = _rows(gate_up), gate_up.shape[-1] // 2
    values, scales = _room(rows.shape[0], width, gate_up.device)
    head, tail = _blocks(width, always=True)
    _quantize_swiglu[(rows.shape[0],)](
        rows, values, scales, rows.stride(0), width, HEAD=head, TAIL=tail, num_warps=_warps(head)
    )
    return values, scales


def rms_norm_fused(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """model.linear.rms_norm in one pass; x: [..., K], weight: [K] -> [..., K] in weight's dtype."""
    rows = _rows(x)
    normed = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    assert weight.shape == rows.shape[1:], "the norm's weight does not fit the row"
    block = next_power_of_2(rows.shape[1])
    _rms_norm[(rows.shape[0],)](
        rows, weight, normed, rows.stride(0), rows.shape[1], eps, BLOCK=block, num_warps=_warps(block)
    )
    return normed


def swiglu_fused(gate_up: Tensor) -> Tensor:
    """model.linear.swiglu in one pass; gate_up: [..., gate | up] of 2 * K -> [..., K]."""
    rows, width = _rows(gate_up), gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, next_power_of_2(width))
    grid = (rows.shape[0], -(-width // block))  # of the second dimension there are 65535 at most
    _swiglu_kernel[grid](rows, out, rows.stride(0), width, BLOCK=block, num_warps=4)
    return out


def normalized(x: Tensor, before: Before) -> Tensor:
    """before(x), in one pass."""
    if before is None:
        return x
    return rms_norm_fused(x, before.weight, before.eps) if isinstance(before, RMSNorm) else swiglu_fused(x)


def quantized(x: Rows, before: Before) -> Quantized:
    """quantize(before(x)), in one pass. Rows in several blocks become one without being copied before."""
    if isinstance(before, SwiGLU):
        return swiglu_quantize(joined(x))
    if isinstance(before, RMSNorm):
        return rms_norm_quantize(joined(x), before.weight, before.eps)
    if isinstance(x, Tensor):
        return quantize(x)
    values, scales = _room(count_tokens(x), x[0].shape[-1], x[0].device)
    counts = [count_tokens(block) for block in x]
    for block, into in zip(x, zip(values.split(counts), scales.split(counts), strict=True), strict=True):
        _quantize(block, None, 0.0, into)
    return values, scales


def next_token_reference(logits: Tensor, table: Tensor | None, token: Tensor, embedded: Tensor, at: Tensor) -> None:
    """The place of the largest logit goes to `token`, its row of the table to `embedded`, and 1 is added to `at`.

    logits: [V], any float dtype; of equal ones the first counts, and a NaN counts as the largest; table: [V, h], or
    None where it is not on the device: then `embedded` stays; token: int64 [1]; embedded: [1, h]; at: int32 [n].
    """
    token.copy_(logits.argmax(-1, keepdim=True))
    if table is not None:
        embedded.copy_(table[token])
    at.add_(1)


def next_token(logits: Tensor, table: Tensor | None, token: Tensor, embedded: Tensor, at: Tensor) -> None:
    """Like `next_token_reference`, without any wait for the device."""
    assert logits.is_contiguous(), "logits have gaps"
    assert embedded.is_contiguous(), "the embedding has gaps"
    assert table is None or table.is_contiguous(), "the table has gaps"
    assert token.dtype == torch.int64, "the token is int64"
    stretches = ceil_div(logits.shape[0], STRETCH)
    best = torch.empty(stretches, dtype=torch.float32, device=logits.device)
    place = torch.empty(stretches, dtype=torch.int32, device=logits.device)
    _best_of_stretch[(stretches,)](
        logits, best, place, logits.shape[0], STRETCH=STRETCH, num_warps=4, **launch_options(logits.device)
    )
    _choose[(1,)](
        best, place, stretches, embedded if table is None else table, token, embedded, at,
        HAS_TABLE=table is not None, WIDTH=embedded.shape[-1], COUNTERS=at.shape[0],
        STRETCHES=next_power_of_2(stretches), WIDE=next_power_of_2(embedded.shape[-1]),
        COUNTED=next_power_of_2(at.shape[0]), num_warps=8, **launch_options(logits.device),
    )  # fmt: skip


def _quantize(x: Tensor, weight: Tensor | None, eps: float, into: Quantized | None = None) -> Quantized:
    rows = _rows(x)
    width = rows.shape[1]
    assert weight is None or weight.shape == (width,), "the norm's weight does not fit the row"
    values, scales = into or _room(rows.shape[0], width, x.device)
    head, tail = _blocks(width) if weight is None else (next_power_of_2(width), 0)
    _quantize_rows[(rows.shape[0],)](
        rows, x if weight is None else weight, values, scales, rows.stride(0), width, eps,
        NORM=weight is not None, HEAD=head, TAIL=tail, num_warps=_warps(head),
    )  # fmt: skip
    return values, scales


def _blocks(width: int, always: bool = False) -> tuple[int, int]:
    """Sizes of one or two blocks, powers of two, that hold a row: two where one would be empty by a quarter or more."""
    block = next_power_of_2(width)
    head = block if width == block else block // 2
    tail = next_power_of_2(width - head) if width > head else 0
    return (head, tail) if always or head + tail <= block * 3 // 4 else (block, 0)


def _room(rows: int, width: int, device: torch.device) -> Quantized:
    values = torch.empty(rows, width, dtype=torch.int8, device=device)
    return values, torch.empty(rows, dtype=torch.float32, device=device)


def _rows(x: Tensor) -> Tensor:
    assert x.shape[-1] <= 2 * MAX_WIDTH, f"rows of {x.shape[-1]} values are too long"
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _warps(block: int) -> int:
    """About 16 values a thread."""
    return max(1, min(16, block // 512))


@jit
def rounded(value, like):
    """value as it would be stored in the dtype of the pointer `like`, back in float32."""
    return value.to(like.dtype.element_ty).to(tl.float32)


@jit
def swiglu_values(gate, up, like):
    """silu(gate) * up of float32 tensors, rounded like the unfused one."""
    return rounded(rounded(gate / (1 + tl.exp(-gate)), like) * up, like)


@jit
def _normed(value, weight, width, eps, like):
    variance = tl.sum(value * value, axis=0) / width
    return rounded(rounded(value * (1 / tl.sqrt_rn(variance + eps)), like) * weight, like)


@jit
def magnitude(value):
    """The bits of |v|, which order like the values, and NaN above all of them: a maximum of floats would lose it."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def whole_quotient(value, scale):
    """value / scale as an integer of -127 to 127.

    The quotient is rounded as division rounds it: a product with the reciprocal, corrected by its remainder (Markstein,
    "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). Division itself took more
    time than all of the memory that such a kernel moves.
    """
    lift = tl.where(scale < LEAST_SCALE, LIFT, 1.0)  # a reciprocal or a remainder beyond the range would be no number
    divisor, value = tl.where(scale == 0, 1.0, scale * lift), value * lift
    reciprocal = tl.div_rn(1.0, divisor)
    guess = value * reciprocal
    quotient = tl.fma(tl.fma(-guess, divisor, value), reciprocal, guess)
    # Adding 1.5 * 2^23 leaves no bits below the point, so the addition itself rounds, halves to even, and the sum's
    # lowest byte is the integer: converting takes longer.
    whole = tl.minimum(tl.maximum(quotient, -127.0), 127.0) + 12582912.0
    return whole.to(tl.int32, bitcast=True).to(tl.int8)


@partial(jit, varying=["scales_ptr"])  # blocks share one tensor of scales and begin anywhere in it
def _quantize_rows(
    x_ptr, weight_ptr, values_ptr, scales_ptr, x_stride, width, eps,
    NORM: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    tl.static_assert(TAIL == 0 or not NORM)
    row = tl.program_id(0).to(tl.int64)
    column, beyond = tl.arange(0, HEAD), HEAD + tl.arange(0, max(TAIL, 1))
    inside = column < width
    value = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    if NORM:
        weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
        value = _normed(value, weight, width, eps, weight_ptr)
    largest = tl.max(magnitude(value), axis=0)
    if TAIL:
        rest = tl.load(x_ptr + row * x_stride + beyond, mask=beyond < width, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(magnitude(rest), axis=0))
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
    tl.store(values_ptr + row * width + column, whole_quotient(value, scale), mask=inside)
    if TAIL:
        tl.store(values_ptr + row * width + beyond, whole_quotient(rest, scale), mask=beyond < width)
    tl.store(scales_ptr + row, scale)


@jit
def _swiglu_chunk(source, width, column, like):
    inside = column < width
    gate = tl.load(source + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(source + width + column, mask=inside, other=0).to(tl.float32)
    return swiglu_values(gate, up, like)


@jit
def _quantize_swiglu(x_ptr, values_ptr, scales_ptr, x_stride, width, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """A row is held whole, as two blocks, whose sizes are powers of two: SwiGLU takes longer than reading, and so is
    computed once."""
    row = tl.program_id(0).to(tl.int64)
    source, target = x_ptr + row * x_stride, values_ptr + row * width
    column, beyond = tl.arange(0, HEAD), HEAD + tl.arange(0, max(TAIL, 1))
    head = _swiglu_chunk(source, width, column, x_ptr)
    largest = tl.max(magnitude(head), axis=0)
    if TAIL:
        tail = _swiglu_chunk(source, width, beyond, x_ptr)
        largest = tl.maximum(largest, tl.max(magnitude(tail), axis=0))
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), 127.0)
    tl.store(target + column, whole_quotient(head, scale), mask=column < width)
    if TAIL:
        tl.store(target + beyond, whole_quotient(tail, scale), mask=beyond < width)
    tl.store(scales_ptr + row, scale)


@jit
def _rms_norm(x_ptr, weight_ptr, normed_ptr, x_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
    normed = _normed(value, weight, width, eps, weight_ptr)
    tl.store(normed_ptr + row * width + column, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@jit
def _swiglu_kernel(gate_up_ptr, out_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up_ptr + row * stride + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + width + column, mask=inside, other=0).to(tl.float32)
    value = swiglu_values(gate, up, gate_up_ptr)
    tl.store(out_ptr + row * width + column, value.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _best_of_stretch(logits_ptr, best_ptr, place_ptr, size, STRETCH: tl.constexpr, OVERLAP: tl.constexpr):
    signal(OVERLAP)
    place = tl.program_id(0) * STRETCH + tl.arange(0, STRETCH)
    wait(OVERLAP)
    value = tl.load(logits_ptr + place, mask=place < size, other=float("-inf")).to(tl.float32)
    value = tl.where(value == value, value, float("inf"))
    best, first = tl.max(value, axis=0, return_indices=True)
    tl.store(best_ptr + tl.program_id(0), best)
    tl.store(place_ptr + tl.program_id(0), tl.program_id(0) * STRETCH + first)


@jit
def _choose(
    best_ptr, place_ptr, stretches, table_ptr, token_ptr, embedded_ptr, at_ptr,
    HAS_TABLE: tl.constexpr, WIDTH: tl.constexpr, COUNTERS: tl.constexpr,
    STRETCHES: tl.constexpr, WIDE: tl.constexpr, COUNTED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # No signal: the next step's kernels read the counters before they wait, so none may start before this one ends.
    stretch, column, counter = tl.arange(0, STRETCHES), tl.arange(0, WIDE), tl.arange(0, COUNTED)
    wait(OVERLAP)
    best = tl.load(best_ptr + stretch, mask=stretch < stretches, other=float("-inf"))
    winner = tl.max(best, axis=0, return_indices=True)[1]
    token = tl.load(place_ptr + winner).to(tl.int64)
    tl.store(token_ptr, token)
    if HAS_TABLE:
        row = tl.load(table_ptr + token * WIDTH + column, mask=column < WIDTH)
        tl.store(embedded_ptr + column, row.to(embedded_ptr.dtype.element_ty), mask=column < WIDTH)
    at = tl.load(at_ptr + counter, mask=counter < COUNTERS)
    tl.store(at_ptr + counter, at + 1, mask=counter < COUNTERS)
