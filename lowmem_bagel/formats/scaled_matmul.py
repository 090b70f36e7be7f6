"""Products of activations that are scaled to fp16 or int8, token by token: see `ops.elementwise`.

This is how cards without bfloat16 compute. E of that page depends on how a matmul returns its result
(`Fp16Matmul.exponent`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.elementwise import Elementwise, Scaled
from ..ops.linear import Add, After, Before, Product, RMSNorm, Rows, SwiGLU, Weights, joined


@dataclass(frozen=True)
class Fp16Matmul:
    """A way to compute a [M, K] fp16 @ b [N, K].T fp16 -> float32 [M, N], accumulating in float32."""

    name: str
    exponent: int
    """Inputs are scaled to magnitudes below 2^exponent; the way is safe from overflow then."""
    multiply: Callable[[Tensor, Tensor], Tensor]
    reason: str = ""
    """Why a better way was not chosen."""


def _upcast(a: Tensor, b: Tensor) -> Tensor:
    return a.float() @ b.float().t()


def _float32_result(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b.t(), out_dtype=torch.float32)


def _float16_result(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.t()).float()


UPCAST = Fp16Matmul("fp16 values multiplied in float32", 15, _upcast)
"""For CPUs, whose fp16 matmul is slow."""

FLOAT32_RESULT = Fp16Matmul("fp16 matmul with float32 result", 15, _float32_result)
"""CUDA with torch 2.8 or newer. No weight can make it overflow."""

FLOAT16_RESULT = Fp16Matmul("fp16 matmul with fp16 result", 6, _float16_result)
"""Any device. Safe for weights whose rows have sums of magnitudes up to 65504 / 2^6 = 1023 (7B shape: about 300)."""


def choose_matmul(device: torch.device) -> Fp16Matmul:
    """The best way that works on the device, found by trying it, with the reason where it is the last resort."""
    if device.type == "cpu":
        return UPCAST
    probe = torch.ones(16, 16, dtype=torch.float16, device=device)
    try:
        works = bool((_float32_result(probe, probe) == 16).all())
    except (TypeError, RuntimeError) as error:
        reason = f"no float32 result from fp16 matmul: {str(error).splitlines()[0]}"
    else:
        if works:
            return FLOAT32_RESULT
        reason = "the fp16 matmul with float32 result gave wrong numbers"
    return Fp16Matmul(FLOAT16_RESULT.name, FLOAT16_RESULT.exponent, FLOAT16_RESULT.multiply, reason)


class ScaledProduct(Product):
    """A product of activations that are made fp16 or int8, token by token."""

    def __init__(self, around: Elementwise) -> None:
        self.around = around

    def scaled(self, x: Tensor, norm: Tensor | None, eps: float) -> Scaled:
        """x [T, K], after the norm where there is one."""
        raise NotImplementedError

    def raw(self, values: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
        """values [T, K] @ W.T [T, N], float32 or int32, but for what `columns` says."""
        raise NotImplementedError

    def columns(self, scales: Tensor | None) -> Tensor | None:
        """What the product's columns must be multiplied by, float32 [N]."""
        return None

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        rows = before(joined(x)) if isinstance(before, SwiGLU) else joined(x)
        product, back = self._raw_product(rows, before, weights)
        found = product, back, self.columns(weights.scales), weights.bias
        if isinstance(after, Add):
            residual = after.residual
            return self.around.epilogue_add(residual.view(-1, residual.shape[-1]), *found).view(residual.shape)
        y = self.around.epilogue(*found) if after is None else self.around.epilogue_swiglu(*found)
        return y.view(*rows.shape[:-1], y.shape[-1])

    def _raw_product(self, rows: Tensor, before: Before, weights: Weights) -> Scaled:
        """The product and the tokens' scales; the scaled activations are let go here, before the epilogue."""
        norm, eps = (before.weight, before.eps) if isinstance(before, RMSNorm) else (None, 0.0)
        values, back = self.scaled(rows.reshape(-1, rows.shape[-1]), norm, eps)
        return self.raw(values, weights.weight, weights.scales), back

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        return isinstance(after, SwiGLU)


class Fp16Weights(ScaledProduct):
    """Weights in fp16."""

    def __init__(self, way: Fp16Matmul, around: Elementwise | None = None) -> None:
        super().__init__(around or Elementwise())
        self.way = way

    def scaled(self, x: Tensor, norm: Tensor | None, eps: float) -> Scaled:
        return self.around.to_fp16(x, self.way.exponent, norm, eps)

    def raw(self, values: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
        return self.way.multiply(values, weight)
