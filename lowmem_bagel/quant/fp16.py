"""fp16 weights with a report of what the narrower range cost, and fp16 arithmetic that cannot overflow.

bfloat16 has 8 significant bits and float16 has 11, so a bfloat16 weight inside float16's normal range
[6.1e-5, 65504] keeps its value exactly. Above, the conversion is refused; below, float16 has fewer bits and finally
none, and the loss is measured.

The arithmetic: the residual stream is float32, and each token (row of x) is scaled by a power of two before the fp16
matmul and back after it, which changes no bit of a value except at the ends of the range:

    e_t = exponent with max |x_t| < 2^e_t
    y   = matmul(fp16(x_t * 2^(E - e_t)), W) * 2^(e_t - E) + bias       accumulated, scaled and added in float32

E depends on how the matmul returns its result (`Fp16Matmul.exponent`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConversionError
from ..model.linear import Linear
from .blocks import map_blocks
from .linear import BLOCK_VALUES, Dequantize, QuantMatmul, row_blocks, stored

MAX = 65504.0
SMALLEST_NORMAL = 2.0**-14
MAX_SHIFT = 100
"""Limit of the per-token exponent shift, within which powers of two are normal float32 numbers."""
CONVERTED_AT_ONCE = 1 << 15
"""Values of a block on the CPU: its half dozen float32 copies stay in a core's own cache."""


@dataclass(frozen=True)
class RangeReport:
    """What float16 did to a tensor. The losses are 0 where every value kept its bits."""

    largest: float
    """Largest magnitude in the source."""
    below_normal: int
    """Non-zero values under float16's normal range, which have fewer bits there."""
    vanished: int
    """Non-zero values that became zero."""
    largest_relative_loss: float
    """max |fp16(w) - w| / |w| over the non-zero values; 1 where a value vanished."""
    largest_absolute_loss: float
    relative_l2: float
    """|fp16(w) - w| / |w| over the whole tensor."""


def convert(tensor: Tensor) -> tuple[Tensor, RangeReport]:
    """A tensor of any shape and float dtype -> (float16, report). Float32 copies are made in blocks.

    Raises:
        ConversionError: a value is infinite, NaN, or beyond 65504. The caller adds the tensor's name.
    """
    half = torch.empty(tensor.shape, dtype=torch.float16, device=tensor.device)
    source, target = tensor.reshape(-1), half.view(-1)
    on_cpu = tensor.device.type == "cpu"
    blocks = row_blocks(source.numel(), 1, CONVERTED_AT_ONCE if on_cpu else BLOCK_VALUES)
    parts = map_blocks(
        lambda block: _convert_block(source[block], target[block]), blocks, threads=None if on_cpu else 1
    )
    squares, lost = (math.fsum(getattr(part, name) for part in parts) for name in ("squares", "lost_squares"))
    report = RangeReport(
        largest=max((part.largest for part in parts), default=0.0),
        below_normal=sum(part.below_normal for part in parts),
        vanished=sum(part.vanished for part in parts),
        largest_relative_loss=max((part.relative for part in parts), default=0.0),
        largest_absolute_loss=max((part.absolute for part in parts), default=0.0),
        relative_l2=math.sqrt(lost / squares) if squares else 0.0,
    )
    return half, report


@dataclass(frozen=True)
class _Block:
    """What one block adds to the report."""

    largest: float
    below_normal: int
    vanished: int
    relative: float
    absolute: float
    squares: float
    lost_squares: float


def _convert_block(source: Tensor, target: Tensor) -> _Block:
    wide = source.double() if source.dtype == torch.float64 else source.float()
    narrow = wide.to(torch.float16)
    target.copy_(narrow)
    magnitude = wide.abs()
    peak = float(magnitude.max())
    if not math.isfinite(peak):
        raise ConversionError("holds an infinite or NaN value; download it again")
    if bool(narrow.isinf().any()):
        raise ConversionError(f"reaches {peak:.6g}, beyond float16's {MAX:.0f}: keep it bf16, or convert to int8")
    squares = float(magnitude.square().sum(dtype=torch.float64))
    nonzero = magnitude > 0
    below = int((nonzero & (magnitude < SMALLEST_NORMAL)).sum())
    loss = (narrow.to(wide.dtype) - wide).abs_()
    absolute = float(loss.max())
    if not absolute:
        return _Block(peak, below, 0, 0.0, 0.0, squares, 0.0)
    return _Block(
        largest=peak,
        below_normal=below,
        vanished=int((nonzero & (narrow == 0)).sum()),
        relative=float((loss / torch.where(nonzero, magnitude, torch.ones_like(magnitude))).max()),
        absolute=absolute,
        squares=squares,
        lost_squares=float(loss.square().sum(dtype=torch.float64)),
    )


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


def scaled_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, matmul: Fp16Matmul) -> Tensor:
    """x [..., K] (float32) @ weight [N, K].T (fp16) + bias -> float32 [..., N], by this file's arithmetic."""
    wide = x.reshape(-1, x.shape[-1]).float()
    _, exponent = torch.frexp(wide.abs().amax(-1, keepdim=True))
    shift = (matmul.exponent - exponent).clamp_(-MAX_SHIFT, MAX_SHIFT)
    y = matmul.multiply((wide * _power_of_two(shift)).to(torch.float16), weight) * _power_of_two(-shift)
    if bias is not None:
        y = y + bias.float()
    return y.view(*x.shape[:-1], weight.shape[0])


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for int32 within the normal range, made from its bits: a device's exp2 may be off by an ulp."""
    return ((exponent + 127) << 23).view(torch.float32)


class ScaledFp16Linear(Linear):
    """fp16 `weight` [out, in] and float32 `bias` [out]; takes float32 (or narrower) activations, returns float32.

    Norms and activations before it must be float32 too: give `after_rmsnorm` a float32 norm weight or one that may
    be widened, and `after_swiglu` the float32 result of the previous linear.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, matmul: Fp16Matmul) -> None:
        super().__init__(in_features, out_features)
        self.matmul = matmul
        self.weight = stored(out_features, in_features, dtype=torch.float16)
        self.bias = stored(out_features, dtype=torch.float32) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return scaled_matmul(x, self.weight, self.bias, self.matmul)

    def after_rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().after_rmsnorm(x.float(), weight.float(), eps)

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        return super().after_swiglu(gate_up.float())


INTEGERS_DOWN = 2.0**-12
"""Makes INT8's integers about as large as weights are, for which the exponents of a matmul's activations are chosen,
and keeps them in float16's normal range: exact."""


class ScaledFp16Dequantized(QuantMatmul):
    """Quantised weights dequantised to fp16 for this arithmetic.

    The result is float32 whatever x's dtype is.
    """

    def __init__(self, dequantize: Dequantize, matmul: Fp16Matmul) -> None:
        self.dequantize = dequantize
        self.fp16 = matmul

    def matmul(self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return scaled_matmul(x, self.dequantize(weight, scales, torch.float16), bias, self.fp16)
