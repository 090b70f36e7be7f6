"""bf16 arithmetic for a card without Triton: a library's matmuls, and what surrounds them by `ops.elementwise`."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ...ops.elementwise import Elementwise
from ...ops.linear import Add, After, Before, Product, RMSNorm, Rows, SwiGLU, Weights, joined


class ElementwiseDense(Product):
    """Dense weights."""

    def __init__(self, around: Elementwise) -> None:
        self.around = around

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        return F.linear(x, weights.weight, weights.bias)

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        if isinstance(after, Add):
            residual = after.residual if weights.bias is None else after.residual.add_(weights.bias)
            if before is None:
                return add_products(residual, x, weights.weight)
            return add_product(residual, before_product(self.around, joined(x), before), weights.weight)
        y = self.multiply(before_product(self.around, joined(x), before), weights)
        return y if after is None else by_rows(y, self.around.swiglu)

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        return isinstance(after, SwiGLU)


def before_product(around: Elementwise, x: Tensor, before: Before) -> Tensor:
    """before(x) by the steps."""
    if isinstance(before, RMSNorm):
        return by_rows(x, lambda rows: around.rms_norm(rows, before.weight, before.eps))
    return x if before is None else by_rows(x, around.swiglu)


def by_rows(x: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    """A step on [T, K] done on [..., K]."""
    rows = step(x.reshape(-1, x.shape[-1]))
    return rows.view(*x.shape[:-1], rows.shape[-1])


def add_product(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual += x @ weight.T by the matmul, which rounds once where a matmul and an addition round twice."""
    residual.view(-1, len(weight)).addmm_(x.reshape(-1, weight.shape[1]), weight.t())
    return residual


def add_products(residual: Tensor, x: Rows, weight: Tensor) -> Tensor:
    """`add_product` of each of the rows of a batch, which are not put together for it."""
    blocks = [x] if isinstance(x, Tensor) else list(x)
    for rows, block in zip(residual.split([len(block) for block in blocks]), blocks, strict=True):
        add_product(rows, block, weight)
    return residual
