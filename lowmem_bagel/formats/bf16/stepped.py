"""bf16 arithmetic for a card without Triton: a library's matmuls, and what surrounds them by `narrow.TokenSteps`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.linear import DenseLinear
from ..scaled_matmul import FLOAT32_RESULT, Nf4AsFp16, TokenSteps


class SteppedDenseLinear(DenseLinear):
    """The dense linear. Its tensors are those of DenseLinear."""

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, steps: TokenSteps) -> None:
        super().__init__(in_features, out_features, bias, dtype)
        self.steps = steps

    def after_rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.forward(by_rows(x, lambda rows: self.steps.normed(rows, weight, eps)))

    def activates(self, tokens: int) -> bool:
        return True

    def activated(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return by_rows(self.after_rmsnorm(x, weight, eps), self.steps.gated)

    def added(self, residual: Tensor, x: Sequence[Tensor]) -> Tensor:
        if self.bias is not None:
            residual.add_(self.bias)
        for rows, block in zip(residual.split([len(block) for block in x]), x, strict=True):
            add_product(rows, block, self.weight)
        return residual


class SteppedNf4(Nf4AsFp16):
    """NF4 linears: one token is multiplied as the weight is read; for more it is dequantised to bf16."""

    def __init__(self, steps: TokenSteps) -> None:
        super().__init__(FLOAT32_RESULT, steps)

    def matmul(self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if _one_token(x):
            return super().matmul(x, weight, scales, bias)
        return F.linear(x, self.steps.levels(weight, scales), bias)

    def after_rmsnorm(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        if _one_token(x):
            return super().after_rmsnorm(x, norm, eps, weight, scales, bias)
        return self.matmul(by_rows(x, lambda rows: self.steps.normed(rows, norm, eps)), weight, scales, bias)

    def activated(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        if _one_token(x):
            return super().activated(x, norm, eps, weight, scales, bias)
        return by_rows(self.after_rmsnorm(x, norm, eps, weight, scales, bias), self.steps.gated)

    def added(self, residual: Tensor, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        if _one_token(x):
            return super().added(residual, x, weight, scales, bias)
        return add_product(residual if bias is None else residual.add_(bias), x, self.steps.levels(weight, scales))


def _one_token(x: Tensor) -> bool:
    return x.numel() == x.shape[-1]


def by_rows(x: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    """A step on [T, K] done on [..., K]."""
    rows = step(x.reshape(-1, x.shape[-1]))
    return rows.view(*x.shape[:-1], rows.shape[-1])


def add_product(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual += x @ weight.T by the matmul, which rounds once where a matmul and an addition round twice."""
    residual.view(-1, len(weight)).addmm_(x.reshape(-1, weight.shape[1]), weight.t())
    return residual
