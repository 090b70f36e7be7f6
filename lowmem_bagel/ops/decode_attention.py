"""Attention of one new token of text: how its kernels are called, and PyTorch's operations for where none runs."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import Rope, projected


class AttendToken(Protocol):
    """One token's attention from its raw projection; `kernels.decode_attention.attend_token_reference` says what."""

    def __call__(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        tables: Rope,
        position: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        length: Tensor,
    ) -> Tensor: ...


def attend_token(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, tables: Rope,
    position: Tensor, k_cache: Tensor, v_cache: Tensor, length: Tensor,
) -> Tensor:  # fmt: skip
    """Like `kernels.decode_attention.attend_token_reference`, without any wait for the device.

    The whole cache is read, so rows that nothing was written to must be finite; q and k are rounded to the cache's
    dtype. The query heads that share a key/value head stand side by side as its queries, so no key is copied.
    """
    kv_heads, d = k_cache.shape[1:]
    heads = qkv.shape[-1] // d - 2 * kv_heads
    cos, sin = (table.index_select(0, position)[:, None, None, :] for table in tables)
    q, k, v = projected(qkv.view(1, 1, -1), q_norm, k_norm, eps, (cos, sin), heads, kv_heads)
    k_cache.index_copy_(0, length.long(), k[0].to(k_cache.dtype))
    v_cache.index_copy_(0, length.long(), v[0].to(v_cache.dtype))
    visible = torch.arange(k_cache.shape[0], device=k_cache.device) <= length
    out = F.scaled_dot_product_attention(
        q.view(1, kv_heads, heads // kv_heads, d).to(k_cache.dtype),
        k_cache.transpose(0, 1)[None],
        v_cache.transpose(0, 1)[None],
        attn_mask=visible.expand(1, 1, heads // kv_heads, -1),
    )
    return out.reshape(heads, d).to(qkv.dtype)
