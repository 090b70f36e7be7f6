"""QK norm and rope of a block's fused projection in one pass, written where attention will read them.

Per head: k = rope(rms_norm(k) * weight), all in float32 and rounded once, as the model does it. Keys and values go
straight to their place in the key/value cache. One token of text does the same inside its attention
(`decode_attention`).
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from torch import Tensor

from ..ops import rope as reference
from ..ops.rope import Projected, Rope
from .triton_language import jit, next_power_of_2, tl

qk_norm_rope_reference = reference.qk_norm_rope


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
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == cos.stride(-1) == 1, "rows have gaps"
    assert cos.stride() == sin.stride(), "cos and sin are laid out differently"
    assert k.stride() == v.stride(), "keys and values are laid out differently"
    assert q.stride(2) == d, "the heads of a query have gaps"
    assert next_power_of_2(d) == d, "the kernel wants a head size that is a power of two"
    _qk_norm_rope[(length, batch)](
        rows, q_norm, k_norm, cos, sin, q, k, v,
        rows.stride(0), rows.stride(1), cos.stride(0), cos.stride(1), q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), k.stride(2), eps,
        HEADS=heads, KV_HEADS=kv_heads, D=d,
        ALL=next_power_of_2(heads + 2 * kv_heads), num_warps=4,
    )  # fmt: skip


@jit
def _qk_norm_rope(
    qkv_ptr, q_norm_ptr, k_norm_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr,
    qkv_batch, qkv_token, rope_batch, rope_token, q_batch, q_token, kv_batch, kv_token, kv_head, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One token: its heads of q, k and v as rows of [ALL, D], taken as halves for the rotation."""
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
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
    rope_start = batch * rope_batch + token * rope_token
    cos_left, cos_right = _halves(cos_ptr + rope_start, half, HALF)
    sin_left, sin_right = _halves(sin_ptr + rope_start, half, HALF)
    turned_left = (left * cos_left[None, :] - right * sin_left[None, :]).to(q_ptr.dtype.element_ty)
    turned_right = (right * cos_right[None, :] + left * sin_right[None, :]).to(q_ptr.dtype.element_ty)

    q_target = q_ptr + batch * q_batch + token * q_token + head[:, None] * D + half[None, :]
    tl.store(q_target, turned_left, mask=is_q[:, None])
    tl.store(q_target + HALF, turned_right, mask=is_q[:, None])
    kv_start = batch * kv_batch + token * kv_token
    k_target = k_ptr + kv_start + (head - HEADS)[:, None] * kv_head + half[None, :]
    tl.store(k_target, turned_left, mask=is_k[:, None])
    tl.store(k_target + HALF, turned_right, mask=is_k[:, None])
    v_target = v_ptr + kv_start + (head - HEADS - KV_HEADS)[:, None] * kv_head + half[None, :]
    tl.store(v_target, raw_left, mask=is_v[:, None])
    tl.store(v_target + HALF, raw_right, mask=is_v[:, None])


@jit
def _halves(ptr, half, HALF: tl.constexpr):
    return tl.load(ptr + half).to(tl.float32), tl.load(ptr + HALF + half).to(tl.float32)
