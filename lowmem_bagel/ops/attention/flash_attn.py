"""The separately installed flash_attn package."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import first_line
from .base import AttentionBackend, AttentionRequest, Causal, Unavailable
from .spec import HALVES, AttentionSpec, Cost, one_more

if TYPE_CHECKING:
    from torch import Tensor


class FlashAttnPackage(AttentionBackend):
    """Its causal mask ends at the last key since version 2.1."""

    name = "flash-attn"

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._function(q, k, v)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return self._function(q, k, v, causal=True)


def make(request: AttentionRequest) -> AttentionBackend:
    try:
        package = importlib.import_module("flash_attn")
    except ImportError as error:
        raise Unavailable(f"the flash_attn package cannot be imported ({first_line(error)})") from error
    return FlashAttnPackage(package.flash_attn_func)


FLASH_ATTN = AttentionSpec(
    "flash-attn",
    "the flash_attn package",
    make,
    order=10,
    cost=Cost(one_more, 350 / 989),  # assumed like `flash`
    capability=(8, 0),
    dtypes=HALVES,
    package=("flash_attn", "flash-attn"),
)
