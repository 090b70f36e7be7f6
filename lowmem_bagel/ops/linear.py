"""The interface of a linear layer, and the dense one.

A linear is called in one of three ways, because what precedes a matmul decides what can be fused with it. The
defaults compute the plain PyTorch reference; a quantised linear overrides what its kernels fuse.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps), computed in float32, rounded to weight's dtype, times weight. x: [..., D]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(weight.dtype) * weight


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up = [..., gate | up]: [..., 2K] -> [..., K]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class Linear(nn.Module):
    """y = x @ W.T + b for W [out_features, in_features]; the weight's form is the subclass's business.

    All tensors of a linear, in whatever form, are its parameters and buffers, so that a loader can derive the layout
    of a memory blob from a linear built on the meta device and point its tensors into that blob.
    """

    why_not_captured: str | None = None
    """None where a CUDA graph can capture this linear, else the reason."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features], in x's dtype."""
        raise NotImplementedError

    def after_rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """forward(rms_norm(x, weight, eps))."""
        return self.forward(rms_norm(x, weight, eps))

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        """forward(swiglu(gate_up)); gate_up: [..., 2 * in_features]."""
        return self.forward(swiglu(gate_up))

    def activates(self, tokens: int) -> bool:
        """Whether `activated` of so many tokens takes no longer than `after_rmsnorm`, because one kernel does both."""
        return False

    def activated(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """swiglu(after_rmsnorm(x, weight, eps)): [..., out_features / 2]."""
        return swiglu(self.after_rmsnorm(x, weight, eps))

    def added(self, residual: Tensor, x: Sequence[Tensor]) -> Tensor:
        """residual + forward(x), x being consecutive rows of the batch. The residual is given up: its memory may hold
        the result."""
        return residual + self.forward(joined(x))

    def added_after_swiglu(self, residual: Tensor, gate_up: Tensor) -> Tensor:
        """residual + after_swiglu(gate_up). The residual is given up."""
        return residual + self.after_swiglu(gate_up)


def joined(rows: Sequence[Tensor]) -> Tensor:
    """Consecutive rows of a batch as one tensor, without a copy where there is but one."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


class DenseLinear(Linear):
    """Weight and bias in the dtype of the arithmetic."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
