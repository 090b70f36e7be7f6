"""Rotation of a linear's inputs by group-wise Hadamard matrices, which spreads outlier channels before quantisation.

With H = blockdiag(h, h, ...), h the symmetric orthonormal Hadamard matrix (Sylvester's) of the group's size, H H = 1:

    W x = (W H)(H x)

so W H is quantised and stored, and x is rotated before it is multiplied. The group is the largest power of two up to
256 that divides the row's length: 256 for BAGEL's 3584 = 14 * 256 and 18944 = 74 * 256.

Linears that share an input (q, k and v; gate and up) are fused by rows and so must be rotated all or none: `measure`
is given their fused weight, and its verdict holds for all of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops.linear import After, Before, Product, Rows, Weights, joined
from ...ops.routed import Groups, Routes
from ..base import row_blocks
from ..measure import output_error
from . import codec as int8

MAX_GROUP = 256
WORTHWHILE = 0.95
"""A rotation is kept where it brings the error below this share of the plain one."""


def group_size(in_features: int) -> int:
    """The largest power of two up to 256 that divides `in_features`; 1 means that nothing can be rotated."""
    return min(in_features & -in_features, MAX_GROUP)


class Rotation:
    """Multiplication by H for one group size.

    h of size r * c is the Kronecker product of those of sizes r and c, so a group is reshaped to [r, c] and multiplied
    from both sides: 32 multiplications a value instead of 256.
    """

    def __init__(self, group: int) -> None:
        assert group.bit_count() == 1, "Sylvester's matrices exist for powers of two"
        self.group = group
        self._factors: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K], K a multiple of the group -> x H in x's dtype, computed in float32."""
        left, right = self._on(x.device)
        groups = x.reshape(-1, left.shape[0], right.shape[0]).float()
        rotated = left @ (groups @ right) * float(self.group**-0.5)
        return rotated.view(x.shape).to(x.dtype)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The factors of h. They are copied to a device at its first use, so a CUDA graph needs one call before."""
        if device not in self._factors:
            bits = self.group.bit_length() - 1
            left, right = hadamard(1 << (bits // 2)), hadamard(1 << (bits - bits // 2))
            self._factors[device] = left.to(device), right.to(device)
        return self._factors[device]


def hadamard(order: int) -> Tensor:
    """Sylvester's matrix of +1 and -1, float32 [order, order], for a power of two."""
    matrix = torch.ones(1, 1, device="cpu")  # even while a model is built on the meta device
    while matrix.shape[0] < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8.quantize of the rotated weight [out, in], rotated in float32 by blocks of rows.

    Raises:
        ConversionError: as int8.quantize.
    """
    rotation = Rotation(group_size(weight.shape[1]))
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for rows in row_blocks(*weight.shape):
        values[rows], scale[rows] = int8.quantize(rotation(weight[rows].float()))
    return values, scale


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] before rotation, from what `quantize` stored: rotated back, as H is its own inverse."""
    rotation = Rotation(group_size(weight.shape[1]))
    dense = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in row_blocks(*weight.shape):
        dense[rows] = rotation(int8.dequantize(weight[rows], scale[rows], torch.float32))
    return dense


class Rotated(Product):
    """Rotates the activations, then multiplies as `inner` does. Its weight must have been rotated likewise."""

    def __init__(self, inner: Product, rotation: Rotation) -> None:
        self.inner, self.rotation = inner, rotation
        self.graph_blocker = inner.graph_blocker

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        rows = joined(x)
        return self.inner.product(self.rotation(rows if before is None else before(rows)), weights, None, after)

    def prepared(self, x: Tensor, before: Before) -> Tensor:
        return self.inner.prepared(x, before)

    def grouped(self, x: Tensor, weights: Weights, groups: Groups, before: Before = None) -> Tensor:
        return self.inner.grouped(self.rotation(self.prepared(x, before)), weights, groups)

    def add_slots(self, residual: Tensor, slots: Tensor, routes: Routes) -> Tensor:
        return self.inner.add_slots(residual, slots, routes)

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        return self.inner.fuses(tokens, None, after)


@dataclass(frozen=True)
class Measurement:
    """Relative L2 error of a linear's output in the W8A8 arithmetic, against float32, on the same activations."""

    plain: float
    rotated: float
    group: int

    @property
    def keep(self) -> bool:
        """Whether the rotation lowers the error by enough to pay for its time; less is noise of the sample."""
        return self.rotated < WORTHWHILE * self.plain


def measure(weight: Tensor, x: Tensor) -> Measurement:
    """Both errors of the fused weight [out, in] of any float dtype on activations x [tokens, in].

    Raises:
        ConversionError: as int8.quantize.
    """
    group = group_size(weight.shape[1])
    plain = output_error(weight, *int8.quantize(weight), int8.IntMm(), x)
    rotated = output_error(weight, *quantize(weight), Rotated(int8.IntMm(), Rotation(group)), x)
    return Measurement(plain, rotated, group)
