"""INT8 weights in arithmetic of scaled tokens: multiplied by int8 activations, or made fp16 for the matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.elementwise import Elementwise, Scaled
from ...ops.int8 import int_mm
from ..scaled_matmul import FLOAT32_RESULT, Fp16Matmul, Fp16Weights, ScaledProduct
from .packed import INTEGERS_DOWN, PackedInt8


class Int8AsFp16(Fp16Weights):
    """On a card without int8 products: the integers are made fp16, and their scales meet the product."""

    def __init__(self, way: Fp16Matmul, around: Elementwise | None = None, packed: PackedInt8 | None = None) -> None:
        super().__init__(way, around)
        self.packed = packed or PackedInt8(torch.float16)

    def raw(self, values: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
        if len(values) == 1 and self.packed.compiled:
            return self.packed.times_token(values, weight).mul_(INTEGERS_DOWN)
        return self.way.multiply(values, self.packed.to_half(weight))

    def columns(self, scales: Tensor | None) -> Tensor | None:
        assert scales is not None
        return scales / INTEGERS_DOWN


class Int8Products(ScaledProduct):
    """Times int8 activations; one token is not quantized where the weight is but read."""

    def __init__(self, around: Elementwise, packed: PackedInt8) -> None:
        super().__init__(around)
        self.packed = packed

    def scaled(self, x: Tensor, norm: Tensor | None, eps: float) -> Scaled:
        if len(x) == 1 and self.packed.compiled:
            return self.around.to_fp16(x, FLOAT32_RESULT.exponent, norm, eps)
        return self.around.to_int8(x, norm, eps)

    def raw(self, values: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
        if values.dtype == torch.float16:
            return self.packed.times_token(values, weight)
        return int_mm(values, weight).contiguous()

    def columns(self, scales: Tensor | None) -> Tensor | None:
        return scales
