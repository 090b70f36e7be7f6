"""cuDNN's kernel for large full blocks, the fastest on Hopper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import AttentionBackend, Causal
from .spec import HALVES, AttentionSpec, Cost, one_more

if TYPE_CHECKING:
    from torch import Tensor


class Cudnn(AttentionBackend):
    """`companion` takes all but large full blocks.

    cuDNN builds a plan for every new shape, some milliseconds each: that pays for a picture's tokens, attended to in
    every layer of every step, and not for texts, whose number of keys changes with every call.
    """

    name = "cudnn"
    MIN_QUERIES = 128

    def __init__(self, companion: AttentionBackend) -> None:
        self.companion = companion

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] < self.MIN_QUERIES:
            return self.companion(q, k, v, None)
        import torch

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
        return out.transpose(1, 2)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return self.companion(q, k, v, mask)


CUDNN = AttentionSpec(
    "cudnn",
    "cuDNN's kernel for a picture's tokens, another backend for the rest",
    lambda request, companion: Cudnn(companion),
    order=20,
    cost=Cost(one_more, 605 / 989),  # attention_h200.json: 605 of 989 TFLOP/s
    first_on=(9, 10),  # Hopper and datacentre Blackwell
    capability=(8, 0),
    dtypes=HALVES,
    switch="cudnn_sdp_enabled",
    companions=("flash", "efficient", "chunked"),
)
