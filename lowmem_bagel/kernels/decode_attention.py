"""Attention of one new token over a key/value cache, with its QK norm, its rope and its row of the cache.

The cache is cut into a fixed number of parts, whatever its length, so that one captured CUDA graph serves every step
and short caches still use many multiprocessors: position and length are read from the device. Each program takes one
part for all query heads of one key/value head (K and V are read once), makes these queries itself, and leaves an
unnormalised sum with its maximum and denominator; a second kernel joins the parts (flash decoding, as described by Dao
and others, 2023). The new key and value are used from registers by the last part's programs, which write them.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import torch
from torch import Tensor

from ..ops.rope import Rope, projected
from .dependent_launch import launch_options, signal, wait
from .triton_language import jit, next_power_of_2, tl

PARTS = 64
"""Parts of the cache; with 4 key/value heads, 256 programs, two to a multiprocessor of an H200."""
STEP_BYTES = 128
"""Bytes of a column that a program handles at a time: 64 rows of a half-precision cache."""
GRAIN = 16
"""A part has a multiple of so many rows."""


def attention_reference(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the first `length` rows of the cache, in float32.

    q: [H, d]; k, v: [S, KV, d], head h reads key/value head h // (H / KV); length: int32 [1], at least 1 and at most S;
    returns [H, d] in q's dtype. Rows from `length` on are never used, whatever they hold.
    """
    visible = torch.arange(k.shape[0], device=k.device) < length
    group = q.shape[0] // k.shape[1]
    keys, values = (
        torch.where(visible[:, None, None], t, 0).float().transpose(0, 1).repeat_interleave(group, dim=0)
        for t in (k, v)
    )
    scores = torch.einsum("hd,hsd->hs", q.float(), keys) / q.shape[1] ** 0.5
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hs,hsd->hd", weights, values).to(q.dtype)


def attend_token_reference(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, tables: Rope,
    position: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor,
) -> Tensor:  # fmt: skip
    """One token of text: its key and value go to row `length` of the caches, and it attends to them and all before.

    qkv: [(H + 2 KV) * d]; q_norm, k_norm: [d]; tables: cos and sin float32 [positions, d]; position, length: int32 [1]
    on the device; k_cache, v_cache: [S, KV, d]; returns [H, d] in qkv's dtype. Positions and rows are the caller's to
    keep in range. q and k are rounded to the cache's dtype.
    """
    kv_heads, d = k_cache.shape[1:]
    heads = qkv.shape[-1] // d - 2 * kv_heads
    cos, sin = (table[position.long()][:, None, None, :] for table in tables)
    q, k, v = projected(qkv.view(1, 1, -1), q_norm, k_norm, eps, (cos, sin), heads, kv_heads)
    k_cache.index_copy_(0, length.long(), k[0].to(k_cache.dtype))
    v_cache.index_copy_(0, length.long(), v[0].to(v_cache.dtype))
    return attention_reference(q[0, 0].to(k_cache.dtype), k_cache, v_cache, length + 1).to(qkv.dtype)


def attend_token(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, tables: Rope,
    position: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor, parts: int = PARTS,
) -> Tensor:  # fmt: skip
    """Like `attend_token_reference`, without any wait for the device.

    Position and length are read at once and must not be written by a kernel that signals (see `dependent_launch`). The
    caches may have gaps between rows and heads, alike.
    """
    kv_heads, d = k_cache.shape[1:]
    cos, sin = tables
    heads = qkv.shape[-1] // d - 2 * kv_heads
    assert cos.is_contiguous(), "the table of cosines has gaps"
    assert sin.is_contiguous(), "the table of sines has gaps"
    assert position.dtype == length.dtype == torch.int32, "position and length are int32 on the device"
    assert k_cache.shape == v_cache.shape, "keys and values differ in shape"
    assert k_cache.stride() == v_cache.stride(), "keys and values are laid out differently"
    assert k_cache.stride(2) == 1, "rows have gaps"
    assert qkv.is_contiguous(), "heads have gaps"
    assert next_power_of_2(d) == d, "the kernel wants a head size that is a power of two"
    x, k, v, group = qkv, k_cache, v_cache, heads // kv_heads
    options = launch_options(x.device)
    sums = torch.empty(heads, parts, d, dtype=torch.float32, device=x.device)
    extents = torch.empty(2, heads, parts, dtype=torch.float32, device=x.device)
    out = torch.empty(heads, d, dtype=x.dtype, device=x.device)
    _attend_part[(kv_heads, parts)](
        x, q_norm, k_norm, cos, sin, position, length, k, v, sums, extents, k.stride(0), k.stride(1), d**-0.5, eps,
        GROUP=group, ROWS=max(16, next_power_of_2(group)), HEADS=heads, D=d,
        PARTS=parts, STEP=STEP_BYTES // k.element_size(), GRAIN=GRAIN, num_warps=4, **options,
    )  # fmt: skip
    _join_parts[(heads,)](sums, extents, out, HEADS=heads, D=d, PARTS=parts, num_warps=4, **options)
    return out


@jit
def _rotated(x_ptr, norm_ptr, head, real, cos, sin, column, eps, D: tl.constexpr):
    """Heads [N] of a projection after norm and rope, float32 [N, D]."""
    partner = (column + D // 2) % D
    turn = tl.where(column < D // 2, -sin, sin)
    source = x_ptr + head[:, None] * D
    value = tl.load(source + column[None, :], mask=real[:, None], other=0).to(tl.float32)
    other = tl.load(source + partner[None, :], mask=real[:, None], other=0).to(tl.float32)
    rstd = (1 / tl.sqrt_rn(tl.sum(value * value, axis=1) / D + eps))[:, None]
    value = value * rstd * tl.load(norm_ptr + column).to(tl.float32)[None, :]
    other = other * rstd * tl.load(norm_ptr + partner).to(tl.float32)[None, :]
    return value * cos[None, :] + other * turn[None, :]


@jit
def _attend_part(
    x_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, position_ptr, length_ptr, k_ptr, v_ptr, sums_ptr, extents_ptr,
    row_stride, head_stride, scale, eps,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    PARTS: tl.constexpr, STEP: tl.constexpr, GRAIN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    signal(OVERLAP)
    kv_head, part = tl.program_id(0), tl.program_id(1)
    length = tl.load(length_ptr)
    rows = tl.cdiv(tl.cdiv(length, PARTS), GRAIN) * GRAIN
    begin = part * rows
    end = tl.minimum(begin + rows, length)
    member = tl.arange(0, ROWS)  # of the group of query heads, padded to what a matmul takes
    column = tl.arange(0, D)
    head = kv_head * GROUP + member
    real = member < GROUP
    maximum = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    denominator = tl.zeros((ROWS,), dtype=tl.float32)
    total = tl.zeros((ROWS, D), dtype=tl.float32)
    turn = tl.load(position_ptr) * D + column
    cos, sin = tl.load(cos_ptr + turn), tl.load(sin_ptr + turn)
    wait(OVERLAP)
    q = _rotated(x_ptr, q_norm_ptr, head, real, cos, sin, column, eps, D).to(k_ptr.dtype.element_ty)
    if part == PARTS - 1:  # the shortest part has the new row, in registers, beside its own
        own = HEADS + kv_head + tl.zeros((1,), dtype=tl.int32)
        new_k = _rotated(x_ptr, k_norm_ptr, own, own >= 0, cos, sin, column, eps, D).to(k_ptr.dtype.element_ty)
        new_v = tl.load(x_ptr + (HEADS + HEADS // GROUP + kv_head) * D + column).to(v_ptr.dtype.element_ty)
        target = length.to(tl.int64) * row_stride + kv_head * head_stride + column
        tl.store(k_ptr + target[None, :], new_k)
        tl.store(v_ptr + target, new_v)
        maximum = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale
        denominator += 1
        total += new_v.to(tl.float32)[None, :]
    for start in tl.range(begin, end, STEP):
        row = start + tl.arange(0, STEP)
        place = row.to(tl.int64)[:, None] * row_stride + kv_head * head_stride + column[None, :]
        visible = row < end
        k = tl.load(k_ptr + place, mask=visible[:, None], other=0)
        v = tl.load(v_ptr + place, mask=visible[:, None], other=0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, axis=1))
        shrink = tl.exp(maximum - higher)
        weights = tl.exp(scores - higher[:, None])
        denominator = denominator * shrink + tl.sum(weights, axis=1)
        total = total * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = higher
    slot = head * PARTS + part
    tl.store(sums_ptr + slot[:, None] * D + column[None, :], total, mask=real[:, None])
    tl.store(extents_ptr + slot, maximum, mask=real)
    tl.store(extents_ptr + HEADS * PARTS + slot, denominator, mask=real)


@jit
def _join_parts(
    sums_ptr, extents_ptr, out_ptr, HEADS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, OVERLAP: tl.constexpr
):
    signal(OVERLAP)
    head = tl.program_id(0)
    part = tl.arange(0, PARTS)
    column = tl.arange(0, D)
    wait(OVERLAP)
    sums = tl.load(sums_ptr + (head * PARTS + part)[:, None] * D + column[None, :])
    maximum = tl.load(extents_ptr + head * PARTS + part)
    denominator = tl.load(extents_ptr + HEADS * PARTS + head * PARTS + part)
    # A part beyond the cache's end has the maximum -inf, and so no weight.
    weight = tl.exp(maximum - tl.max(maximum, axis=0))
    value = tl.sum(sums * weight[:, None], axis=0) / tl.sum(denominator * weight, axis=0)
    tl.store(out_ptr + head * D + column, value.to(out_ptr.dtype.element_ty))
