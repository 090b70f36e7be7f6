"""NF4 weights made halves for a matmul, or multiplied with one token as they are read."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.elementwise import Elementwise
from ...ops.linear import After, Before, Rows, Weights, count_tokens
from ...ops.routed import Groups
from ..dense.elementwise import ElementwiseDense
from ..scaled_matmul import FLOAT32_RESULT, Fp16Matmul, Fp16Weights
from .packed import PackedNf4


class Nf4AsFp16(Fp16Weights):
    """In fp16 arithmetic."""

    def __init__(self, way: Fp16Matmul, around: Elementwise | None = None, packed: PackedNf4 | None = None) -> None:
        super().__init__(way, around)
        self.packed = packed or PackedNf4(torch.float16)

    def raw(self, values: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
        assert scales is not None
        if len(values) == 1 and self.packed.compiled:
            return self.packed.times_token(values, weight, scales)
        return self.way.multiply(values, self.packed.to_half(weight, scales))

    def grouped(self, x: Tensor, weights: Weights, groups: Groups, before: Before = None) -> Tensor:
        return Fp16Weights(self.way, self.around).grouped(x, self._as_half(weights), groups, before)

    def _as_half(self, weights: Weights) -> Weights:
        weight, scales, bias = weights
        assert scales is not None
        return Weights(self.packed.to_half(weight, scales), None, bias)


class ElementwiseNf4(Nf4AsFp16):
    """In bf16 without Triton: one token is multiplied as the weight is read; for more it is made bf16."""

    def __init__(self, around: Elementwise, packed: PackedNf4) -> None:
        super().__init__(FLOAT32_RESULT, around, packed)
        self.dense = ElementwiseDense(around)

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        if count_tokens(x) == 1:
            return super().product(x, weights, before, after)
        return self.dense.product(x, self._as_half(weights), before, after)

    def grouped(self, x: Tensor, weights: Weights, groups: Groups, before: Before = None) -> Tensor:
        return self.dense.grouped(x, self._as_half(weights), groups, before)
