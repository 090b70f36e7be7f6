"""PyTorch's modules, but that nothing is drawn for what has no memory: a model that is loaded is built on the meta
device, where each tensor that would be initialised takes longer than all else of its module."""

from __future__ import annotations

from typing import Any

from torch import nn


class _Undrawn:
    weight: Any

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()  # type: ignore[misc]


class Linear(_Undrawn, nn.Linear):
    pass


class LayerNorm(_Undrawn, nn.LayerNorm):
    pass


class GroupNorm(_Undrawn, nn.GroupNorm):
    pass


class Conv2d(_Undrawn, nn.Conv2d):
    pass
