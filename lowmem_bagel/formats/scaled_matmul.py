"""Arithmetic on narrowed activations: each token is made fp16 or int8 for a matmul, and its product made wide again.

This is how cards without bfloat16 compute, and nothing overflows. The residual stream is float32. Each token (row of
x) is scaled by a power of two before the fp16 matmul and back after it, which changes no bit of a value except at the
ends of the range:

    e_t = exponent with max |x_t| < 2^e_t
    y   = matmul(fp16(x_t * 2^(E - e_t)), W) * 2^(e_t - E) + bias       accumulated, scaled and added in float32

E depends on how the matmul returns its result (`Fp16Matmul.exponent`). INT8 weights are multiplied by int8 activations
where the card has such products, by the arithmetic of `int8`; there 2^(e_t - E) is the token's scale.

What surrounds the matmuls is a set of steps, each in one pass over memory where `kernels.elementwise_cuda` runs. Cards
with bfloat16 but without Triton take the same steps, by `stepped`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.dtypes import wide
from ..ops.linear import rms_norm, swiglu
from ..ops.rope import Projected, Rope, qk_norm_rope
from .base import QuantLinear, QuantMatmul, stored
from .int8 import codec as int8
from .nf4 import codec as nf4

MAX_SHIFT = 100
"""Limit of the per-token exponent shift, within which powers of two are normal float32 numbers."""
INTEGERS_DOWN = 2.0**-12
"""Makes INT8's integers about as large as weights are, for which the exponents of a matmul's activations are chosen,
and keeps them in float16's normal range: exact."""

Narrow = tuple[Tensor, Tensor]
"""Activations as fp16 or int8 [T, K], and the float32 [T] that each token's product must be multiplied by."""


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


class TokenSteps:
    """What stands before and after a matmul, in PyTorch's operations: the reference of `kernels.elementwise_cuda`.

    `half` is the dtype of attention and of weights, fp16 or bf16; `wide` that of what surrounds the matmuls, float32 or
    bf16: of x [T, K], of norm, which is RMSNorm's weight [K] if there is one, of bias and of all results. x may be fp16
    too. A product is [T, N], float32 or int32, contiguous, and is given up: its memory may hold the result, which is

        product * columns * back + bias        in float32; back and columns are float32 [T] and [N]
    """

    name = "PyTorch's operations"
    reads_packed = False
    """Whether `times_token` reads weights as they are stored."""

    def __init__(self, half: torch.dtype = torch.float16) -> None:
        self.half, self.wide = half, wide(half)

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """rms_norm(x, norm, eps)."""
        return rms_norm(x, norm.to(self.wide), eps)

    def gated(self, gate_up: Tensor) -> Tensor:
        """swiglu(gate_up): [T, N] -> [T, N / 2]."""
        return swiglu(gate_up)

    def halved(self, x: Tensor, exponent: int, norm: Tensor | None = None, eps: float = 0.0) -> Narrow:
        """fp16, each token scaled to magnitudes below 2^exponent."""
        values = x.float() if norm is None else self.normed(x, norm, eps).float()
        _, own = torch.frexp(values.abs().amax(-1, keepdim=True))
        shift = (exponent - own).clamp_(-MAX_SHIFT, MAX_SHIFT)
        return (values * _power_of_two(shift)).to(torch.float16), _power_of_two(-shift)[:, 0]

    def quantised(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Narrow:
        """int8, by the arithmetic of `formats.int8.codec`."""
        values, scale = int8.quantize_tokens(x if norm is None else self.normed(x, norm, eps))
        return values, scale[:, 0]

    def widened(self, product: Tensor, back: Tensor, columns: Tensor | None, bias: Tensor | None) -> Tensor:
        """The result, [T, N]."""
        result = product.float()
        if columns is not None:
            result.mul_(columns)
        result.mul_(back[:, None])
        return (result if bias is None else result.add_(bias)).to(self.wide)

    def added(
        self, residual: Tensor, product: Tensor, back: Tensor, columns: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """The result added to residual, [T, N], in place."""
        return residual.add_(self.widened(product, back, columns, bias))

    def activated(self, product: Tensor, back: Tensor, columns: Tensor | None, bias: Tensor | None) -> Tensor:
        """swiglu of the result: [T, N / 2]."""
        return swiglu(self.widened(product, back, columns, bias))

    def integers(self, weight: Tensor) -> Tensor:
        """int8 [N, K] -> half, times INTEGERS_DOWN."""
        return weight.to(self.half).mul_(INTEGERS_DOWN)

    def levels(self, weight: Tensor, absmax: Tensor) -> Tensor:
        """`nf4.dequantize` to half."""
        return nf4.dequantize(weight, absmax, self.half)

    def times_token(self, token: Tensor, weight: Tensor, absmax: Tensor | None) -> Tensor:
        """token fp16 [1, K] @ weight.T, float32 [1, N]: int8 [N, K] without scales, or NF4 if there is an absmax."""
        dense = weight.float() if absmax is None else nf4.dequantize(weight, absmax, torch.float32)
        return token.float() @ dense.t()

    def rotate(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        rope: Rope,
        heads: int,
        kv_heads: int,
        into: Projected,
    ) -> None:
        """`qk_norm_rope` of a wide qkv into q, k and v of half."""
        qk_norm_rope(qkv, q_norm, k_norm, eps, rope, heads, kv_heads, into)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for int32 within the normal range, made from its bits: a device's exp2 may be off by an ulp."""
    return ((exponent + 127) << 23).view(torch.float32)


class NarrowMatmul(QuantMatmul):
    """A matmul on narrowed activations."""

    def __init__(self, steps: TokenSteps) -> None:
        self.steps = steps

    def narrowed(self, x: Tensor, norm: Tensor | None, eps: float) -> Narrow:
        raise NotImplementedError

    def product(self, values: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """values [T, K] @ W.T [T, N], float32 or int32, but for what `columns` says."""
        raise NotImplementedError

    def columns(self, scales: Tensor) -> Tensor | None:
        """What the product's columns must be multiplied by, float32 [N]."""
        return None

    def matmul(self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return self._multiplied(x, None, 0.0, weight, scales, bias)

    def after_rmsnorm(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        return self._multiplied(x, norm, eps, weight, scales, bias)

    def activates(self, tokens: int) -> bool:
        return True

    def activated(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        product, back = self._product(x, norm, eps, weight, scales)
        y = self.steps.activated(product, back, self.columns(scales), bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def added(self, residual: Tensor, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        product, back = self._product(x, None, 0.0, weight, scales)
        rows = residual.view(-1, residual.shape[-1])
        return self.steps.added(rows, product, back, self.columns(scales), bias).view(residual.shape)

    def _multiplied(
        self, x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        product, back = self._product(x, norm, eps, weight, scales)
        y = self.steps.widened(product, back, self.columns(scales), bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _product(self, x: Tensor, norm: Tensor | None, eps: float, weight: Tensor, scales: Tensor) -> Narrow:
        values, back = self.narrowed(x.reshape(-1, x.shape[-1]), norm, eps)
        return self.product(values, weight, scales), back


class Fp16Weights(NarrowMatmul):
    """Weights in fp16."""

    def __init__(self, way: Fp16Matmul, steps: TokenSteps | None = None) -> None:
        super().__init__(steps or TokenSteps())
        self.way = way

    def narrowed(self, x: Tensor, norm: Tensor | None, eps: float) -> Narrow:
        return self.steps.halved(x, self.way.exponent, norm, eps)

    def product(self, values: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return self.way.multiply(values, weight)


class Nf4AsFp16(Fp16Weights):
    """NF4 weights, made fp16 for the matmul."""

    def product(self, values: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        if len(values) == 1 and self.steps.reads_packed:
            return self.steps.times_token(values, weight, scales)
        return self.way.multiply(values, self.steps.levels(weight, scales))


class Int8AsFp16(Fp16Weights):
    """INT8 weights on a card without int8 products: the integers are made fp16, and their scales meet the product."""

    def product(self, values: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        if len(values) == 1 and self.steps.reads_packed:
            return self.steps.times_token(values, weight, None).mul_(INTEGERS_DOWN)
        return self.way.multiply(values, self.steps.integers(weight))

    def columns(self, scales: Tensor) -> Tensor | None:
        return scales / INTEGERS_DOWN


class Int8Products(NarrowMatmul):
    """INT8 weights times int8 activations; one token is not quantised where the weight is but read."""

    def narrowed(self, x: Tensor, norm: Tensor | None, eps: float) -> Narrow:
        if len(x) == 1 and self.steps.reads_packed:
            return self.steps.halved(x, FLOAT32_RESULT.exponent, norm, eps)
        return self.steps.quantised(x, norm, eps)

    def product(self, values: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        if values.dtype == torch.float16:
            return self.steps.times_token(values, weight, None)
        return int8.int_mm(values, weight).contiguous()

    def columns(self, scales: Tensor) -> Tensor | None:
        return scales


class ScaledFp16Linear(QuantLinear):
    """fp16 `weight` [out, in] and float32 `bias` [out]; takes float32 or fp16 activations, returns float32."""

    def __init__(self, in_features: int, out_features: int, bias: bool, matmul: Fp16Weights) -> None:
        super().__init__(in_features, out_features, matmul)
        self.weight = stored(out_features, in_features, dtype=torch.float16)
        self.bias = stored(out_features, dtype=torch.float32) if bias else None

    @property
    def scales(self) -> Tensor:
        """None stored: empty."""
        return self.weight[:0, 0]
