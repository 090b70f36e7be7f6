"""The dense linear with what precedes it fused: for a card that runs Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.elementwise import rms_norm_fused, swiglu_fused
from ...kernels.gemv import gemv
from ...kernels.swiglu_matmul import LEAST_TOKENS, swiglu_matmul
from ...ops.linear import DenseLinear, joined
from .stepped import add_product

ONE_KERNEL_TOKENS = 2
"""Up to so many tokens one kernel does all. Beyond, the library's tensor cores win by more than the extra kernel for
the norm costs, as tried on an H200 at BAGEL-7B's shapes with 1, 2, 4 and 8 tokens."""


class TritonDenseLinear(DenseLinear):
    """Few tokens: one kernel that reads the weight once. More: a fused norm or SwiGLU, then the library's matmul; where
    `swiglu_processors` says how many multiprocessors can, SwiGLU in a matmul of our own. The tensors are those of
    DenseLinear."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, swiglu_processors: int = 0
    ) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.swiglu_processors = 0 if bias else swiglu_processors

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= ONE_KERNEL_TOKENS * x.shape[-1]:
            return gemv(x, self.weight, bias=self.bias)
        return F.linear(x, self.weight, self.bias)

    def after_rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.numel() <= ONE_KERNEL_TOKENS * x.shape[-1]:
            return gemv(x, self.weight, bias=self.bias, norm=weight, eps=eps, dtype=weight.dtype)
        return F.linear(rms_norm_fused(x, weight, eps), self.weight, self.bias)

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        if gate_up.numel() <= ONE_KERNEL_TOKENS * gate_up.shape[-1]:
            return gemv(gate_up, self.weight, bias=self.bias, swiglu_input=True)
        return F.linear(swiglu_fused(gate_up), self.weight, self.bias)

    def activates(self, tokens: int) -> bool:
        return tokens == 1 or (tokens >= LEAST_TOKENS and self.swiglu_processors > 0)

    def activated(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.numel() <= ONE_KERNEL_TOKENS * x.shape[-1]:
            return gemv(x, self.weight, bias=self.bias, norm=weight, eps=eps, swiglu_output=True, dtype=weight.dtype)
        if self.swiglu_processors and x.numel() >= LEAST_TOKENS * x.shape[-1]:
            return swiglu_matmul(rms_norm_fused(x, weight, eps), self.weight, self.swiglu_processors)
        return swiglu_fused(self.after_rmsnorm(x, weight, eps))

    def added(self, residual: Tensor, x: Sequence[Tensor]) -> Tensor:
        if residual.numel() <= ONE_KERNEL_TOKENS * residual.shape[-1]:
            return gemv(joined(x), self.weight, bias=self.bias, residual=residual)
        if self.bias is not None:
            return super().added(residual, x)
        for rows, block in zip(residual.split([len(block) for block in x]), x, strict=True):
            add_product(rows, block, self.weight)
        return residual

    def added_after_swiglu(self, residual: Tensor, gate_up: Tensor) -> Tensor:
        if residual.numel() <= ONE_KERNEL_TOKENS * residual.shape[-1]:
            return gemv(gate_up, self.weight, bias=self.bias, swiglu_input=True, residual=residual)
        if self.bias is not None:
            return super().added_after_swiglu(residual, gate_up)
        return add_product(residual, swiglu_fused(gate_up), self.weight)
