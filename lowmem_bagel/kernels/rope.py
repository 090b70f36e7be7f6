"""QK norm and rope of a block's fused projection in one pass, written where attention will read them.

Per head: k = rope(rms_norm(k) * weight), all in float32 and rounded once, as the model does it. Keys and values go
straight to their place in the key/value arena; for text decoding that place and the position are read from the device,
so that a captured CUDA graph can be replayed for every token.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

import torch
from torch import Tensor

from ..model import decoder
from ..model.decoder import Projected, Rope
from .triton_language import jit, next_power_of_2, tl

qk_norm_rope_reference = decoder.qk_norm_rope


def qk_norm_rope(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, rope: Rope, heads: int, kv_heads: int, into: Projected
) -> None:
    """Like `qk_norm_rope_reference`, into tensors of qkv's dtype with any strides but the last, k's and v's equal."""
    batch, length, width = qkv.shape
    d = width // (heads + 2 * kv_heads)
    q, k, v = into
    assert q.shape == (batch, length, heads, d), "the room for q does not fit the block"
    assert k.shape == v.shape == (batch, length, kv_heads, d), "the room for k and v does not fit the block"
    rows = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    cos, sin = (table.expand(batch, length, 1, d) for table in rope)
    _launch(rows, q_norm, k_norm, eps, cos, sin, q, k, v)


def append_token_reference(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, tables: Rope,
    position: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor,
) -> Tensor:  # fmt: skip
    """One token of text: its key and value go to row `length` of the caches, its query [H, d] is returned.

    qkv: [(H + 2 KV) * d]; tables: cos and sin float32 [positions, d]; position, length: int32 [1] on the device;
    k_cache, v_cache: [S, KV, d]. Positions and rows are the caller's to keep in range.
    """
    kv_heads, d = k_cache.shape[1:]
    heads = qkv.shape[-1] // d - 2 * kv_heads
    cos, sin = (table[position.long()][:, None, None, :] for table in tables)
    q, k, v = decoder.projected(qkv.view(1, 1, -1), q_norm, k_norm, eps, (cos, sin), heads, kv_heads)
    k_cache.index_copy_(0, length.long(), k[0].to(k_cache.dtype))
    v_cache.index_copy_(0, length.long(), v[0])
    return q[0, 0].to(qkv.dtype)


def append_token(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, tables: Rope,
    position: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor,
) -> Tensor:  # fmt: skip
    """Like `append_token_reference`, without any wait for the device."""
    kv_heads, d = k_cache.shape[1:]
    heads = qkv.shape[-1] // d - 2 * kv_heads
    assert position.dtype == length.dtype == torch.int32, "position and length are int32 on the device"
    q = torch.empty(heads, d, dtype=qkv.dtype, device=qkv.device)
    cos, sin = (table[None, :, None, :] for table in tables)
    _launch(
        qkv.view(1, 1, -1), q_norm, k_norm, eps, cos, sin, q[None, None], k_cache[None], v_cache[None],
        position=position, length=length,
    )  # fmt: skip
    return q


def _launch(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor,
    *, position: Tensor | None = None, length: Tensor | None = None,
) -> None:  # fmt: skip
    batch, tokens, heads, d = q.shape
    assert qkv.stride(-1) == q.stride(-1) == k.stride(-1) == v.stride(-1) == cos.stride(-1) == 1, "rows have gaps"
    assert cos.stride() == sin.stride(), "cos and sin are laid out differently"
    assert k.stride() == v.stride(), "keys and values are laid out differently"
    assert q.stride(2) == d, "the heads of a query have gaps"
    assert next_power_of_2(d) == d, "the kernel wants a head size that is a power of two"
    kv_heads = k.shape[2]
    places = (qkv, qkv) if position is None or length is None else (position, length)
    _qk_norm_rope[(tokens, batch)](
        qkv, q_norm, k_norm, cos, sin, q, k, v, *places,
        qkv.stride(0), qkv.stride(1), cos.stride(0), cos.stride(1), q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), k.stride(2), eps,
        APPEND=length is not None, HEADS=heads, KV_HEADS=kv_heads, D=d,
        ALL=next_power_of_2(heads + 2 * kv_heads), num_warps=4,
    )  # fmt: skip


@jit
def _qk_norm_rope(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, position_ptr, length_ptr,
    qkv_batch, qkv_token, rope_batch, rope_token, q_batch, q_token, kv_batch, kv_token, kv_head, eps,
    APPEND: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One token: its heads of q, k and v as rows of [ALL, D], taken as halves for the rotation."""
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    rope_row, kv_row = token, token
    if APPEND:
        rope_row = tl.load(position_ptr).to(tl.int64)
        kv_row = tl.load(length_ptr).to(tl.int64)
    head = tl.arange(0, ALL)
    half = tl.arange(0, HALF)
    is_q = head < HEADS
    is_k = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_v = (head >= HEADS + KV_HEADS) & (head < HEADS + 2 * KV_HEADS)

    source = qkv_ptr + batch * qkv_batch + token * qkv_token + head[:, None] * D + half[None, :]
    inside = (is_q | is_k | is_v)[:, None]
    raw_left = tl.load(source, mask=inside, other=0)
    raw_right = tl.load(source + HALF, mask=inside, other=0)
    left, right = raw_left.to(tl.float32), raw_right.to(tl.float32)
    square = tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1)
    rstd = 1 / tl.sqrt_rn(square / D + eps)

    q_left, q_right = _halves(q_norm_ptr, half, HALF)
    k_left, k_right = _halves(k_norm_ptr, half, HALF)
    left = left * rstd[:, None] * tl.where(is_q[:, None], q_left[None, :], k_left[None, :])
    right = right * rstd[:, None] * tl.where(is_q[:, None], q_right[None, :], k_right[None, :])
    rope_start = batch * rope_batch + rope_row * rope_token
    cos_left, cos_right = _halves(cos_ptr + rope_start, half, HALF)
    sin_left, sin_right = _halves(sin_ptr + rope_start, half, HALF)
    turned_left = (left * cos_left[None, :] - right * sin_left[None, :]).to(q_ptr.dtype.element_ty)
    turned_right = (right * cos_right[None, :] + left * sin_right[None, :]).to(q_ptr.dtype.element_ty)

    q_target = q_ptr + batch * q_batch + token * q_token + head[:, None] * D + half[None, :]
    tl.store(q_target, turned_left, mask=is_q[:, None])
    tl.store(q_target + HALF, turned_right, mask=is_q[:, None])
    kv_start = batch * kv_batch + kv_row * kv_token
    k_target = k_ptr + kv_start + (head - HEADS)[:, None] * kv_head + half[None, :]
    tl.store(k_target, turned_left, mask=is_k[:, None])
    tl.store(k_target + HALF, turned_right, mask=is_k[:, None])
    v_target = v_ptr + kv_start + (head - HEADS - KV_HEADS)[:, None] * kv_head + half[None, :]
    tl.store(v_target, raw_left, mask=is_v[:, None])
    tl.store(v_target + HALF, raw_right, mask=is_v[:, None])


@jit
def _halves(ptr, half, HALF: tl.constexpr):
    return tl.load(ptr + half).to(tl.float32), tl.load(ptr + HALF + half).to(tl.float32)
