"""`torch._int_mm` as it is on a processor with VNNI, and on one without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_bagel.ops.int8 import pairs_overflow


def exact(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).to(torch.int32)


def saturating(a: Tensor, b: Tensor) -> Tensor:
    """`a + 128` times `b`, each two products added in 16 bits, less 128 `b`."""
    products = F.pad((a.long() + 128)[:, :, None] * b.long(), (0, 0, 0, len(b) % 2))
    pairs = products.unflatten(1, (-1, 2)).sum(2)
    return (pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * b.long().sum(0)).to(torch.int32)


@pytest.fixture
def exact_int_mm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests of what integers are used for: they are exact, whatever processor runs the tests."""
    if pairs_overflow():
        monkeypatch.setattr(torch, "_int_mm", exact)
        pairs_overflow.cache_clear()
    yield
    pairs_overflow.cache_clear()


@pytest.fixture
def saturating_int_mm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As oneDNN multiplies on a processor without VNNI."""
    monkeypatch.setattr(torch, "_int_mm", saturating)
    pairs_overflow.cache_clear()
    yield
    pairs_overflow.cache_clear()
