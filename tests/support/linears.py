"""Linears of any form with given tensors, what can stand around their products, and what they must give."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowmem_bagel.ops.linear import (
    SWIGLU,
    Add,
    After,
    Before,
    Dense,
    Linear,
    Product,
    RMSNorm,
    Rows,
    Stored,
    Weights,
)

PAIRS = list(itertools.product(("", "rmsnorm", "swiglu"), ("", "swiglu", "add")))
"""What can stand before a product, and after it."""


def linear(product: Product, weight: Tensor, scales: Tensor | None = None, bias: Tensor | None = None) -> Linear:
    """A linear with a product and these very tensors, under the names that a loader gives them."""
    packed = weight.dtype == torch.uint8
    stored: dict[str, Stored] = {"weight": (weight.shape, weight.dtype)}
    if scales is not None:
        stored["absmax" if packed else "scale"] = scales.shape, scales.dtype
    inputs = weight.shape[1] * (2 if packed else 1)
    with torch.device("meta"):
        made = Linear(inputs, len(weight), stored, product, None if bias is None else bias.dtype)
    given = [tensor for tensor in (weight, scales, bias) if tensor is not None]
    for (name, _), tensor in zip(list(made.named_parameters()), given, strict=True):
        setattr(made, name, nn.Parameter(tensor, requires_grad=False))
    return made


class Call(NamedTuple):
    """What a linear is called with: `linear(*call.to(...))`."""

    x: Rows
    before: Before
    after: After

    def to(self, where: torch.device | torch.dtype) -> Call:
        """A copy, since a residual is given up."""

        def copied(tensor: Tensor) -> Tensor:
            return tensor.to(where, copy=True)

        x = copied(self.x) if isinstance(self.x, Tensor) else [copied(rows) for rows in self.x]
        before, after = self.before, self.after
        if isinstance(before, RMSNorm):
            before = RMSNorm(copied(before.weight), before.eps)
        return Call(x, before, Add(copied(after.residual)) if isinstance(after, Add) else after)

    def in_rows(self, sizes: Sequence[int]) -> Call:
        """The same with the activations in consecutive rows of their batch."""
        assert isinstance(self.x, Tensor)
        return self._replace(x=self.x.split(list(sizes)))

    def exact(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The result for a dense weight [out, in], in float64 but for a norm's float32."""
        x, before, after = self.to(torch.float64)
        wide = Weights(weight.double(), None, None if bias is None else bias.double())
        return Dense().product(x, wide, before, after)


def call(pair: tuple[str, str], shape: Sequence[int], weight: tuple[int, int], seed: int | None = 0) -> Call:
    """Random float32 activations [*shape, in] for a weight [out, in], with a pair of `PAIRS` around its product.

    seed: None takes torch's own random numbers.
    """
    random = None if seed is None else torch.Generator("cpu").manual_seed(seed)
    outputs, inputs = weight

    def gaussian(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random, device="cpu")

    before, after = pair
    x = gaussian(*shape, 2 * inputs if before == "swiglu" else inputs)
    norm, residual = 1 + 0.2 * gaussian(inputs), gaussian(*shape, outputs)
    befores: dict[str, Before] = {"": None, "rmsnorm": RMSNorm(norm, 1e-6), "swiglu": SWIGLU}
    afters: dict[str, After] = {"": None, "swiglu": SWIGLU, "add": Add(residual)}
    return Call(x, befores[before], afters[after])
