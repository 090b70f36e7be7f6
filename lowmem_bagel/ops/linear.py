"""The contract of a linear layer: a product, with what precedes it and what follows it.

    y = after(before(x) @ W.T + b)

What stands around a matmul decides what can be fused with it, so it is part of the call. A `Product` says how
activations meet weights of one form; it has no weights itself, and one object serves all linears of a model. Its base
class computes everything in PyTorch's operations, which is the reference; a subclass overrides what its kernels fuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .routed import Groups, Routes, add_slots

Rows = Tensor | Sequence[Tensor]
"""Activations [..., in_features], or consecutive rows of their batch."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps), computed in float32, rounded to weight's dtype, times weight. x: [..., D]."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(weight.dtype) * weight


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up = [..., gate | up]: [..., 2K] -> [..., K]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """A norm before a product; weight: [in_features]."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class SwiGLU:
    """Before a product, x is [..., 2 * in_features]; after it, the result is [..., out_features / 2]."""

    def __call__(self, gate_up: Tensor) -> Tensor:
        return swiglu(gate_up)


SWIGLU = SwiGLU()


@dataclass(frozen=True, eq=False)
class Add:
    """The product is added to a residual [..., out_features], which is given up: its memory may hold the result."""

    residual: Tensor

    def __call__(self, y: Tensor) -> Tensor:
        return self.residual + y


Before = RMSNorm | SwiGLU | None
After = SwiGLU | Add | None


class Weights(NamedTuple):
    """A linear's tensors as a product reads them: `scales` as the weight's format has them, bias [out_features]."""

    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None


def part_of(weights: Weights, number: int, count: int) -> Weights:
    """The part of one of `count` weights of one shape that are stacked by rows, in whatever form."""

    def part(stacked: Tensor) -> Tensor:
        rows = len(stacked) // count
        return stacked[number * rows : (number + 1) * rows]

    assert weights.bias is None, "stacked weights have no bias"
    return Weights(part(weights.weight), None if weights.scales is None else part(weights.scales))


def joined(rows: Rows) -> Tensor:
    """Consecutive rows of a batch as one tensor, without a copy where there is but one."""
    if isinstance(rows, Tensor):
        return rows
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def count_tokens(x: Rows) -> int:
    """Rows of activations, whatever their leading dimensions."""
    return x.numel() // x.shape[-1] if isinstance(x, Tensor) else sum(map(count_tokens, x))


class Product:
    """A way to multiply by weights of one form."""

    graph_blocker: str | None = None
    """None where a CUDA graph can capture this, else the reason."""

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        """x @ W.T + b: [..., in_features] of any float dtype -> [..., out_features] in x's dtype."""
        raise NotImplementedError

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        """after(before(x) @ W.T + b)."""
        rows = joined(x)
        y = self.multiply(rows if before is None else before(rows), weights)
        return y if after is None else after(y)

    def prepared(self, x: Tensor, before: Before) -> Tensor:
        """before(x), for a result that more than one product reads."""
        return x if before is None else before(x)

    def grouped(self, x: Tensor, weights: Weights, groups: Groups, before: Before = None) -> Tensor:
        """before(x) of each group's rows times the group's own part of the weight, in the groups' order.

        x: [rows, in_features]; weights: parts [out_features, in_features] stacked by rows -> [slots, out_features].
        This way, which every other is held to, waits for the device to know where groups end.
        """
        rows, out = self.prepared(x, before), None
        for number, (start, stop) in enumerate(pairwise(groups.offsets.tolist())):
            if start == stop:
                continue
            group = rows[start:stop] if groups.rows is None else rows.index_select(0, groups.rows[start:stop])
            product, part = self.of_part(weights, rows.shape[-1], number, groups.parts)
            y = product.product(group, part)
            out = y.new_empty(groups.slots(x), y.shape[-1]) if out is None else out
            out[start:stop] = y
        assert out is not None, "nothing was routed"
        return out

    def of_part(self, weights: Weights, width: int, number: int, count: int) -> tuple[Product, Weights]:
        """One of `count` weights with rows of `width` values that are stacked by rows, and what multiplies by it."""
        return self, part_of(weights, number, count)

    def add_slots(self, residual: Tensor, slots: Tensor, routes: Routes) -> Tensor:
        """As `ops.routed.add_slots`, of what `grouped` gave."""
        return add_slots(residual, slots, routes)

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        """Whether `product` of so many tokens takes no longer with `after` than without: one kernel does both."""
        return False


class Dense(Product):
    """Weights in the dtype of the arithmetic."""

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        return F.linear(x, weights.weight, weights.bias)


Stored = tuple[Sequence[int], torch.dtype]
"""Shape and dtype of a tensor that a linear holds."""


LOW_RANK = ("low_rank_a", "low_rank_b")
"""Names of the tensors that `Linear.add_low_rank` adds."""


class Linear(nn.Module):
    """Tensors in whatever form, and the product that reads them.

    All tensors are parameters of this module and nothing derived from them is kept, so that a loader can lay a buffer
    out by a linear built on the meta device, and point its tensors into a buffer that moves or is refilled.

    Args:
        tensors: the weight's tensors by their names here, in the order weight, scales.
        bias: the bias's dtype, None without one.
    """

    side_by_side = False
    """Whether the tensors must lie at the distances at which they were first bound."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tensors: Mapping[str, Stored],
        product: Product,
        bias: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.product = product
        self._dense: Product | None = None
        self._names = tuple(tensors)
        for name, (shape, dtype) in tensors.items():
            self.register_parameter(name, uninitialized(shape, dtype))
        self.register_parameter("bias", None if bias is None else uninitialized((out_features,), bias))

    def add_low_rank(self, rank: int, dtype: torch.dtype, dense: Product) -> None:
        """Add (x @ A.T) @ B.T to what the product gives: adapters beside weights that they cannot be merged into.

        A [rank, in_features] and B [out_features, rank] become tensors of this module, multiplied by `dense`.
        """
        assert self._dense is None
        self._dense = dense
        for name, shape in zip(LOW_RANK, ((rank, self.in_features), (self.out_features, rank)), strict=True):
            self.register_parameter(name, uninitialized(shape, dtype))

    @property
    def graph_blocker(self) -> str | None:
        return self.product.graph_blocker

    def weights(self) -> Weights:
        """The tensors as they lie now."""
        held = self._parameters  # looked up for every product of every token: not by get_parameter, which is slow
        weight, scales = held[self._names[0]], held[self._names[1]] if len(self._names) > 1 else None
        assert weight is not None
        return Weights(weight, scales, held["bias"])

    def forward(self, x: Rows, before: Before = None, after: After = None) -> Tensor:
        """after(before(x) @ W.T + b)."""
        if self._dense is not None:
            return self._with_low_rank(self._dense, x, before, after)
        return self.product.product(x, self.weights(), before, after)

    def prepared(self, x: Tensor, before: Before) -> Tensor:
        """As `Product.prepared`."""
        return self.product.prepared(x, before)

    def grouped(self, x: Tensor, groups: Groups, before: Before = None) -> Tensor:
        """As `Product.grouped`."""
        assert self._dense is None, "adapters are not kept beside stacked weights"
        return self.product.grouped(x, self.weights(), groups, before)

    def add_slots(self, residual: Tensor, slots: Tensor, routes: Routes) -> Tensor:
        """As `Product.add_slots`."""
        return self.product.add_slots(residual, slots, routes)

    def _with_low_rank(self, dense: Product, x: Rows, before: Before, after: After) -> Tensor:
        """Both products fuse what stands before them, and what they make is added up where the result lies."""
        a, b = (self._parameters[name] for name in LOW_RANK)
        assert a is not None and b is not None
        narrow = dense.product(x, Weights(a), before)
        y = self.product.product(x, self.weights(), before, after if isinstance(after, Add) else None)
        y = dense.product(narrow, Weights(b), after=Add(y))
        return after(y) if isinstance(after, SwiGLU) else y

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        """As `Product.fuses`."""
        return self._dense is None and self.product.fuses(tokens, before, after)


class DenseLinear(Linear):
    """Weight [out, in] and bias in one dtype, multiplied by PyTorch or by another product of dense weights."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, product: Product | None = None
    ) -> None:
        tensors = {"weight": ((out_features, in_features), dtype)}
        super().__init__(in_features, out_features, tensors, product or Dense(), dtype if bias else None)


def uninitialized(shape: Sequence[int], dtype: torch.dtype) -> nn.Parameter:
    """A tensor without gradients, on the device of the surrounding `torch.device` context."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
