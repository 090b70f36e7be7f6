"""How a decoder linear is stored and which linear runs it: the seam between a folder's format and the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ..model.linear import DenseLinear, Linear


class StoredLinears(Protocol):
    """One way of storing and running the decoder's linears.

    `modules` are the checkpoint's module names that a (fused) linear stacks by rows.
    """

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        """The linear, to be built on the meta device; its tensors' shapes and dtypes are what memory must hold."""
        ...

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The linear's tensors, bias aside: path in the linear -> stored names, stacked by rows."""
        ...


class DenseLinears:
    """Weights stored as they are used, but for a conversion of dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        return DenseLinear(in_features, out_features, bias, self.dtype)

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {"weight": tuple(f"{module}.weight" for module in modules)}
