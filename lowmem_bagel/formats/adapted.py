"""Linears with adapters kept beside weights that are stored encoded, where merging would change every stored byte.

Weights that are stored as floats have their adapters merged when they are read; see `checkpoint.adapters`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.adapters import LowRank
from ..checkpoint.tensors import TensorSpec
from ..ops.linear import LOW_RANK, Linear
from .base import DenseLinears, StoredLinears


class Place(NamedTuple):
    """Where a weight's factors lie in those of the linear that stacks it: from `start` on, of `total` ranks."""

    start: int
    total: int


class AdaptedLinears(StoredLinears):
    """What another gives, with the adapters' factors as two more tensors of each linear whose weights they change.

    A linear that stacks several weights has A stacked by ranks, and B block-diagonal.

    Args:
        changes: of encoded weights, by module name.
        table: the model's tensors.
        dense: how the factors are multiplied, and their dtype.
    """

    def __init__(
        self,
        inner: StoredLinears,
        changes: Mapping[str, Sequence[LowRank]],
        table: Mapping[str, TensorSpec],
        dense: DenseLinears,
    ) -> None:
        self.inner, self.changes, self.table, self.dense = inner, changes, table, dense
        self.name = f"{inner.name}, adapters beside {len(changes)} weights"
        self._places: dict[str, Place] = {}

    def build(self, modules: Sequence[str], in_features: int, out_features: int, bias: bool) -> Linear:
        linear = self.inner.build(modules, in_features, out_features, bias)
        ranks = [sum(change.rank for change in self.changes.get(module, ())) for module in modules]
        if any(ranks):
            starts = [sum(ranks[:index]) for index in range(len(ranks))]
            self._places |= {m: Place(start, sum(ranks)) for m, start in zip(modules, starts, strict=True)}
            linear.add_low_rank(sum(ranks), self.dense.dtype, self.dense.product(modules))
        return linear

    def sources(self, modules: Sequence[str]) -> dict[str, tuple[str, ...]]:
        found = self.inner.sources(modules)
        if modules[0] in self._places:
            found |= {what: tuple(f"{module}.{what}" for module in modules) for what in LOW_RANK}
        return found

    def read(self, name: str) -> Tensor | None:
        module, _, what = name.rpartition(".")
        if module in self._places and what in LOW_RANK:
            return self._a(module) if what == LOW_RANK[0] else self._b(module)
        return self.inner.read(name)

    def prepare(self, module: nn.Module) -> None:
        self.inner.prepare(module)

    def _shape(self, module: str) -> tuple[int, int]:
        out, width = self.table[f"{module}.weight"].shape
        assert out is not None and width is not None
        return out, width

    def _a(self, module: str) -> Tensor:
        """The factors of all adapters, float32 [ranks, in_features]."""
        found = [change.a.tensor().float() for change in self.changes.get(module, ())]
        return torch.cat(found) if found else torch.empty(0, self._shape(module)[1])

    def _b(self, module: str) -> Tensor:
        """The factors with their scales in the module's own columns, zero in the others; float32 [out, total]."""
        start, total = self._places[module]
        factors = torch.zeros(self._shape(module)[0], total)
        for change in self.changes.get(module, ()):
            factors[:, start : start + change.rank] = change.scale * change.b.tensor().float()
            start += change.rank
        return factors
