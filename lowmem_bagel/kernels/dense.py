"""The dense linear with what precedes it fused: for a card that runs Triton."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..model.linear import DenseLinear
from .fused import rms_norm_fused, swiglu_fused
from .gemv import MAX_ROWS, gemv


class TritonDenseLinear(DenseLinear):
    """Up to MAX_ROWS tokens: one kernel that reads the weight once. More: a fused norm or SwiGLU, then the library's
    matmul. The tensors are those of DenseLinear."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= MAX_ROWS * x.shape[-1]:
            return gemv(x, self.weight, bias=self.bias)
        return F.linear(x, self.weight, self.bias)

    def after_rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.numel() <= MAX_ROWS * x.shape[-1]:
            return gemv(x, self.weight, bias=self.bias, norm=weight, eps=eps, dtype=weight.dtype)
        return F.linear(rms_norm_fused(x, weight, eps), self.weight, self.bias)

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        if gate_up.numel() <= MAX_ROWS * gate_up.shape[-1]:
            return gemv(gate_up, self.weight, bias=self.bias, swiglu_input=True)
        return F.linear(swiglu_fused(gate_up), self.weight, self.bias)
