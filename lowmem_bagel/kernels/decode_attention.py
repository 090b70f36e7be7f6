"""Attention of one new token over a key/value cache whose length is read from the device.

The cache is cut into a fixed number of parts, whatever its length, so that one captured CUDA graph serves every step
and short caches still use many multiprocessors. Each program takes one part for all query heads of one key/value head
(K and V are read once) and leaves an unnormalised sum with its maximum and denominator; a second kernel joins the parts
(flash decoding, as described by Dao and others, 2023).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import torch
from torch import Tensor

from .triton_language import jit, next_power_of_2, tl

PARTS = 32
"""Parts of the cache; with 4 key/value heads, 128 programs."""
STEP_BYTES = 128
"""Bytes of a column that a program handles at a time: 64 rows of a half-precision cache, which parts are made of."""


def decode_attention_reference(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
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


def decode_attention(q: Tensor, k: Tensor, v: Tensor, length: Tensor, parts: int = PARTS) -> Tensor:
    """Like `decode_attention_reference`. k and v may be strided but for their last dimension, alike."""
    heads, d = q.shape
    kv_heads = k.shape[1]
    assert k.shape == v.shape, "keys and values differ in shape"
    assert k.stride() == v.stride(), "keys and values are laid out differently"
    assert k.stride(2) == 1, "rows have gaps"
    assert length.dtype == torch.int32, "length is int32 on the device"
    assert next_power_of_2(d) == d, "the kernel wants a head size that is a power of two"
    group = heads // kv_heads
    sums = torch.empty(heads, parts, d, dtype=torch.float32, device=q.device)
    extents = torch.empty(2, heads, parts, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _attend_part[(kv_heads, parts)](
        q.contiguous(), k, v, sums, extents, length, k.stride(0), k.stride(1), d**-0.5,
        GROUP=group, ROWS=max(16, next_power_of_2(group)), HEADS=heads, D=d,
        PARTS=parts, STEP=STEP_BYTES // k.element_size(), num_warps=4,
    )  # fmt: skip
    _join_parts[(heads,)](sums, extents, out, HEADS=heads, D=d, PARTS=parts, num_warps=4)
    return out


@jit
def _attend_part(
    q_ptr, k_ptr, v_ptr, sums_ptr, extents_ptr, length_ptr, row_stride, head_stride, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    PARTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    kv_head, part = tl.program_id(0), tl.program_id(1)
    length = tl.load(length_ptr)
    rows = tl.cdiv(tl.cdiv(length, PARTS), STEP) * STEP
    begin = part * rows
    end = tl.minimum(begin + rows, length)
    member = tl.arange(0, ROWS)  # of the group of query heads, padded to what a matmul takes
    column = tl.arange(0, D)
    head = kv_head * GROUP + member
    q = tl.load(q_ptr + head[:, None] * D + column[None, :], mask=(member < GROUP)[:, None], other=0)
    maximum = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    denominator = tl.zeros((ROWS,), dtype=tl.float32)
    total = tl.zeros((ROWS, D), dtype=tl.float32)
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
    real = member < GROUP
    tl.store(sums_ptr + slot[:, None] * D + column[None, :], total, mask=real[:, None])
    tl.store(extents_ptr + slot, maximum, mask=real)
    tl.store(extents_ptr + HEADS * PARTS + slot, denominator, mask=real)


@jit
def _join_parts(sums_ptr, extents_ptr, out_ptr, HEADS: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr):
    head = tl.program_id(0)
    part = tl.arange(0, PARTS)
    column = tl.arange(0, D)
    maximum = tl.load(extents_ptr + head * PARTS + part)
    denominator = tl.load(extents_ptr + HEADS * PARTS + head * PARTS + part)
    # A part beyond the cache's end has the maximum -inf, and so no weight.
    weight = tl.exp(maximum - tl.max(maximum, axis=0))
    sums = tl.load(sums_ptr + (head * PARTS + part)[:, None] * D + column[None, :])
    value = tl.sum(sums * weight[:, None], axis=0) / tl.sum(denominator * weight, axis=0)
    tl.store(out_ptr + head * D + column, value.to(out_ptr.dtype.element_ty))
