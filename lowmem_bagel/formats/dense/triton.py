"""Products of dense weights with what stands around them fused: for a card that runs Triton."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ...kernels.elementwise import normalized, swiglu_fused
from ...kernels.gemv import gemv, gemv_options
from ...kernels.grouped_matmul import add_slots, grouped_matmul
from ...kernels.swiglu_matmul import LEAST_TOKENS, swiglu_matmul
from ...ops.linear import Add, After, Before, Product, Rows, SwiGLU, Weights, count_tokens, joined
from ...ops.routed import Groups, Routes
from .elementwise import add_product, add_products

ONE_KERNEL_TOKENS = 2
"""Up to so many tokens one kernel does all. Beyond, the library's tensor cores win by more than the extra kernel for
the norm costs, as tried on an H200 at BAGEL-7B's shapes with 1, 2, 4 and 8 tokens."""


class TritonDense(Product):
    """Few tokens: one kernel that reads the weight once. More: a fused norm or SwiGLU, then the library's matmul; where
    `swiglu_processors` says how many multiprocessors can, SwiGLU in a matmul of our own. groups: whether the kernels of
    routed experts run."""

    def __init__(self, swiglu_processors: int = 0, groups: bool = False) -> None:
        self.swiglu_processors, self.groups = swiglu_processors, groups

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        return F.linear(x, weights.weight, weights.bias)

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        tokens = count_tokens(x)
        if tokens <= ONE_KERNEL_TOKENS:
            return gemv(joined(x), weights.weight, bias=weights.bias, **gemv_options(before, after))
        if before is None and isinstance(after, Add) and weights.bias is None:
            return add_products(after.residual, x, weights.weight)
        rows = normalized(joined(x), before)
        if isinstance(after, SwiGLU):
            if self._activates(tokens) and weights.bias is None:
                return swiglu_matmul(rows, weights.weight, self.swiglu_processors)
            return swiglu_fused(self.multiply(rows, weights))
        if isinstance(after, Add):
            if weights.bias is None:
                return add_product(after.residual, rows, weights.weight)
            return after(self.multiply(rows, weights))
        return self.multiply(rows, weights)

    def prepared(self, x: Tensor, before: Before) -> Tensor:
        return normalized(x, before)

    def grouped(self, x: Tensor, weights: Weights, groups: Groups, before: Before = None) -> Tensor:
        if not self.groups:
            return super().grouped(x, weights, groups, before)
        return grouped_matmul(normalized(x, before), weights.weight, groups)

    def add_slots(self, residual: Tensor, slots: Tensor, routes: Routes) -> Tensor:
        return (add_slots if self.groups else super().add_slots)(residual, slots, routes)

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        return isinstance(after, SwiGLU) and (tokens == 1 or self._activates(tokens))

    def _activates(self, tokens: int) -> bool:
        return tokens >= LEAST_TOKENS and self.swiglu_processors > 0
