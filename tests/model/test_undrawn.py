"""Modules that draw nothing where they have no memory, and elsewhere are PyTorch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowmem_bagel.model import undrawn

KINDS: dict[str, tuple[Any, ...]] = {"Linear": (5, 7), "LayerNorm": (6,), "GroupNorm": (2, 6), "Conv2d": (3, 4, 3)}


@pytest.mark.parametrize("kind", KINDS)
def test_elsewhere_they_begin_as_pytorch_s(kind: str) -> None:
    made = []
    for room in (undrawn, nn):
        torch.manual_seed(3)
        made.append(getattr(room, kind)(*KINDS[kind]).state_dict())
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_drawn_without_memory(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("drawn")

    functions = [nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.ones_, nn.init.zeros_]
    for function in functions:
        monkeypatch.setattr(nn.init, function.__name__, drawn)
    with pytest.raises(AssertionError, match="drawn"):
        getattr(undrawn, kind)(*KINDS[kind])
    with torch.device("meta"):
        module = getattr(undrawn, kind)(*KINDS[kind])
    assert all(parameter.is_meta for parameter in module.parameters())
