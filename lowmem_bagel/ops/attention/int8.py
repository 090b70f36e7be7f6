"""Scores of INT8 queries and keys: for weights that are lossy anyway. The kernel is `kernels.attention_int8`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .base import AttentionBackend, Causal
from .spec import HALVES, AttentionSpec, Call, Cost, one_more

if TYPE_CHECKING:
    from torch import Tensor

Attend = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""q [T, H, d], k and v [S, KV, d] -> [T, H, d], every key seen."""


class Int8(AttentionBackend):
    """`companion` takes all but full blocks of at least so many queries: what is prepared pays for many, and a text is
    attended to exactly."""

    name = "int8"
    MIN_QUERIES = 128

    def __init__(self, attend: Attend, companion: AttentionBackend, least: int = MIN_QUERIES) -> None:
        self._attend, self.companion, self._least = attend, companion, least

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] < self._least:
            return self.companion(q, k, v, None)
        import torch

        outputs = [self._attend(*picture) for picture in zip(q, k, v, strict=True)]
        return outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return self.companion(q, k, v, mask)


def scratch(call: Call) -> int:
    """Queries and keys as integers with their scales, and sums of keys; or what the companion takes."""
    keys = call.keys + 64  # in whole blocks
    prepared = call.tokens * call.heads * (call.head_dim + 4) + keys * call.kv_heads * (call.head_dim + 4)
    return max(prepared, one_more(call))


INT8 = AttentionSpec(
    "int8",
    "scores of INT8 queries and smoothed INT8 keys for a picture's tokens, another backend for the rest",
    "lowmem_bagel.kernels.attention_int8:make",
    order=5,
    # H200: 540 of 989 TFLOP/s, 1.5 times `flash`. On the cards that it is first on it was measured on none: assumed is
    # 1.5 times what is assumed of the kernel that it takes the place of there, `cudnn`.
    cost=Cost(scratch, 540 / 989, by_major=tuple((major, 1.5 * 605 / 989) for major in (8, 12))),
    lossy=True,
    capability=(8, 0),
    dtypes=HALVES,
    features=("triton",),
    companions=("flash", "efficient", "chunked"),
)
