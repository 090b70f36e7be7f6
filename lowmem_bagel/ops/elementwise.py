"""What stands before and after a product whose activations are scaled, token by token, to fp16 or int8.

Each token (row of x) is scaled by a power of two before an fp16 product and back after it, which changes no bit of a
value except at the ends of the range, so that nothing overflows:

    e_t = exponent with max |x_t| < 2^e_t
    y   = product(fp16(x_t * 2^(E - e_t)), W) * 2^(e_t - E) + bias       accumulated, scaled and added in float32

With int8 activations, by the arithmetic of `ops.int8`, 2^(e_t - E) is the token's scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import linear
from .dtypes import wide
from .int8 import quantize_rows
from .rope import Projected, Rope, qk_norm_rope

MAX_SHIFT = 100
"""Limit of the per-token exponent shift, within which powers of two are normal float32 numbers."""

Scaled = tuple[Tensor, Tensor]
"""Activations as fp16 or int8 [T, K], and the float32 [T] that each token's product must be multiplied by."""


class Elementwise:
    """What stands before and after a matmul, in PyTorch's operations: the reference of `kernels.elementwise_cuda`.

    `half` is the dtype of attention and of weights, fp16 or bf16; `wide` that of what surrounds the matmuls, float32 or
    bf16: of x [T, K], of norm, which is RMSNorm's weight [K] if there is one, of bias and of all results. x may be fp16
    too. A product is [T, N], float32 or int32, contiguous, and is given up: its memory may hold the result, which is

        product * columns * back + bias        in float32; back and columns are float32 [T] and [N]
    """

    name = "PyTorch's operations"
    compiled = False
    """Whether kernels that NVRTC compiles do all this."""

    def __init__(self, half: torch.dtype = torch.float16) -> None:
        self.half, self.wide = half, wide(half)

    def rms_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """rms_norm(x, norm, eps)."""
        return linear.rms_norm(x, norm.to(self.wide), eps)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """swiglu(gate_up): [T, N] -> [T, N / 2]."""
        return linear.swiglu(gate_up)

    def to_fp16(self, x: Tensor, exponent: int, norm: Tensor | None = None, eps: float = 0.0) -> Scaled:
        """fp16, each token scaled to magnitudes below 2^exponent."""
        values = x.float() if norm is None else self.rms_norm(x, norm, eps).float()
        _, own = torch.frexp(values.abs().amax(-1, keepdim=True))
        shift = (exponent - own).clamp_(-MAX_SHIFT, MAX_SHIFT)
        return (values * power_of_two(shift)).to(torch.float16), power_of_two(-shift)[:, 0]

    def to_int8(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Scaled:
        """int8, by the arithmetic of `ops.int8`."""
        values, scale = quantize_rows(x if norm is None else self.rms_norm(x, norm, eps))
        return values, scale[:, 0]

    def epilogue(self, product: Tensor, back: Tensor, columns: Tensor | None, bias: Tensor | None) -> Tensor:
        """The result, [T, N]."""
        result = product.float()
        if columns is not None:
            result.mul_(columns)
        result.mul_(back[:, None])
        return (result if bias is None else result.add_(bias)).to(self.wide)

    def epilogue_add(
        self, residual: Tensor, product: Tensor, back: Tensor, columns: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """The result added to residual, [T, N], in place."""
        return residual.add_(self.epilogue(product, back, columns, bias))

    def epilogue_swiglu(self, product: Tensor, back: Tensor, columns: Tensor | None, bias: Tensor | None) -> Tensor:
        """swiglu of the result: [T, N / 2]."""
        return linear.swiglu(self.epilogue(product, back, columns, bias))

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


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent for int32 within the normal range, made from its bits: a device's exp2 may be off by an ulp."""
    return ((exponent + 127) << 23).view(torch.float32)
