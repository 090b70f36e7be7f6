"""The attention that the vision tower and the autoencoder are handed: every token sees every other."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class FullAttention(Protocol):
    """softmax(q @ k.T / sqrt(d)) @ v; every `attention.base.AttentionBackend` is one."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B, T, H, d], k and v: [B, S, H, d] -> [B, T, H, d]."""
        ...


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own choice of kernel, with gradients; where no fused kernel runs, all scores are in memory at once."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
