"""What the linears with quantised weights share: stored tensors on one side, a way to multiply by them on the other.

A quantised linear holds the numbers of the file and nothing derived from them, so its tensors can be views of a
memory blob that moves or is refilled. How the numbers meet the activations is the business of a `QuantMatmul`, of
which one object can serve all linears of a model: references and other packages' kernels are in this package, our
own kernels in `lowmem_bagel.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear import DenseLinear, Linear, joined, rms_norm, swiglu

Dequantize = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""(weight, scales, dtype) -> dense weight [out, in] of that dtype, for the stored tensors of one format."""

BLOCK_VALUES = 1 << 24
"""Values handled at a time where float32 copies are needed: 64 MiB a copy, however large the tensor is."""


CPU_BLOCK_VALUES = 1 << 18
"""The same where the copies should stay in a CPU's cache; 3 to 5 times faster there than going through memory."""


class QuantMatmul:
    """Multiplies activations by quantised weights; a subclass with fused kernels overrides what they fuse.

    x is [..., in_features] of any float dtype, `weight` and `scales` are as the format stores them, bias is
    [out_features] or None; the result is [..., out_features] in x's dtype.
    """

    why_not_captured: str | None = None
    """As `Linear.why_not_captured`."""

    def matmul(self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """x @ W.T + bias."""
        raise NotImplementedError

    def after_rmsnorm(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        """matmul(rms_norm(x, norm, eps), ...)."""
        return self.matmul(rms_norm(x, norm, eps), weight, scales, bias)

    def after_swiglu(self, gate_up: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """matmul(swiglu(gate_up), ...); gate_up: [..., 2 * in_features]."""
        return self.matmul(swiglu(gate_up), weight, scales, bias)

    def activates(self, tokens: int) -> bool:
        """As `Linear.activates`."""
        return False

    def activated(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, scales: Tensor, bias: Tensor | None
    ) -> Tensor:
        """swiglu(after_rmsnorm(x, ...)): [..., out_features / 2]."""
        return swiglu(self.after_rmsnorm(x, norm, eps, weight, scales, bias))

    def added(self, residual: Tensor, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        """residual + matmul(x, ...)."""
        return residual + self.matmul(x, weight, scales, bias)


class Dequantized(QuantMatmul):
    """Dequantises the whole weight into x's dtype, then multiplies: the reference, and the way that always works."""

    def __init__(self, dequantize: Dequantize) -> None:
        self.dequantize = dequantize

    def matmul(self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.dequantize(weight, scales, x.dtype), None if bias is None else bias.to(x.dtype))


class QuantLinear(Linear):
    """A linear that hands its stored tensors to a `QuantMatmul`. Subclasses create `weight` and the scales."""

    weight: nn.Parameter

    def __init__(self, in_features: int, out_features: int, matmul: QuantMatmul) -> None:
        super().__init__(in_features, out_features)
        self.matmul = matmul
        self.why_not_captured = matmul.why_not_captured
        self.bias: nn.Parameter | None = None

    @property
    def scales(self) -> Tensor:
        """The format's scales, under whatever name it stores them."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul.matmul(x, self.weight, self.scales, self.bias)

    def after_rmsnorm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.matmul.after_rmsnorm(x, weight, eps, self.weight, self.scales, self.bias)

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        return self.matmul.after_swiglu(gate_up, self.weight, self.scales, self.bias)

    def activates(self, tokens: int) -> bool:
        return self.matmul.activates(tokens)

    def activated(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.matmul.activated(x, weight, eps, self.weight, self.scales, self.bias)

    def added(self, residual: Tensor, x: Sequence[Tensor]) -> Tensor:
        return self.matmul.added(residual, joined(x), self.weight, self.scales, self.bias)


def stored(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised tensor of a linear, on the device of the surrounding `torch.device` context."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def row_blocks(rows: int, width: int, values: int = BLOCK_VALUES) -> Iterator[slice]:
    """Slices of whole rows of a matrix, each of at most about `values` values and of at least one row."""
    step = max(1, values // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def dequantize_blocks(dense: Tensor) -> Iterator[slice]:
    """Row blocks of the size that suits filling the dense matrix on its device."""
    rows, width = dense.shape
    return row_blocks(rows, width, CPU_BLOCK_VALUES if dense.device.type == "cpu" else BLOCK_VALUES)


class StoredLinears(Protocol):
    """One way of storing and running the decoder's linears.

    `modules` are the checkpoint's module names that a (fused) linear stacks by rows.
    """

    name: str
    """Format and backend, as `doctor` and plans show it."""

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        """The linear, to be built on the meta device; its tensors' shapes and dtypes are what memory must hold."""
        ...

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The linear's tensors, bias aside: path in the linear -> stored names, stacked by rows."""
        ...

    def stored(self, name: str) -> tuple[str, ...]:
        """The stored tensors that make up a tensor of the checkpoint, in a folder without a manifest."""
        ...

    def read(self, name: str) -> Tensor | None:
        """A tensor that is not stored plainly (a weight that is decoded at load); None for all others."""
        ...


MakeDense = Callable[[int, int, bool, torch.dtype], Linear]


class DenseLinears:
    """Weights used as they are stored, but for a conversion of dtype."""

    def __init__(self, dtype: torch.dtype, make: MakeDense = DenseLinear, name: str = "dense") -> None:
        self.dtype, self.make, self.name = dtype, make, name

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        return self.make(in_features, out_features, bias, self.dtype)

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {"weight": tuple(f"{module}.weight" for module in modules)}

    def stored(self, name: str) -> tuple[str, ...]:
        return (name,)

    def read(self, name: str) -> Tensor | None:
        return None
