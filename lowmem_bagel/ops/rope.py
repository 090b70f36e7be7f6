"""Rotary positions, and the QK norm that goes with them: what kernels of a fused projection are held to."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .linear import rms_norm

Rope = tuple[Tensor, Tensor]
"""cos and sin, float32, each broadcastable to [B, T, heads, head_dim]."""

Projected = tuple[Tensor, Tensor, Tensor]
"""q [B, T, heads, head_dim], k and v [B, T, kv_heads, head_dim]."""


class Rotate(Protocol):
    """QK norm and rope of a fused projection; `qk_norm_rope` is the reference."""

    def __call__(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        rope: Rope,
        heads: int,
        kv_heads: int,
        into: Projected,
    ) -> None: ...


def rope_at(positions: Tensor, head_dim: int, theta: float) -> Rope:
    """cos and sin for NeoX-style (rotate-half) rope; positions [B, T] -> two float32 [B, T, 1, head_dim]."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[..., None] * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)[:, :, None, :]
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """x: float32 [B, T, heads, head_dim]."""
    cos, sin = rope
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def projected(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, rope: Rope, heads: int, kv_heads: int
) -> Projected:
    """qkv [B, T, (heads + 2 kv_heads) * d] -> q and k in float32, v as it is.

    k = rope(rms_norm(k) * k_norm), q likewise.
    """
    parts = qkv.unflatten(-1, (heads + 2 * kv_heads, -1))
    q, k, v = parts.split((heads, kv_heads, kv_heads), dim=-2)
    return apply_rope(rms_norm(q, q_norm.float(), eps), rope), apply_rope(rms_norm(k, k_norm.float(), eps), rope), v


def qk_norm_rope(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, rope: Rope, heads: int, kv_heads: int, into: Projected
) -> None:
    """`projected`, rounded once into q, k and v where attention reads them: `into`, of any dtype and strides."""
    for room, found in zip(into, projected(qkv, q_norm, k_norm, eps, rope, heads, kv_heads), strict=True):
        room.copy_(found)
