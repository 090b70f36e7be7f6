"""PyTorch's memory-efficient kernel: every card since Maxwell, every dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import AttentionBackend, Causal, per_picture
from .spec import AttentionSpec, Cost, two_more

if TYPE_CHECKING:
    from torch import Tensor


class Efficient(AttentionBackend):
    """A causal block behind a past is the kernel's own."""

    name = "efficient"
    _NO_MASK, _CAUSAL_TO_THE_LAST_KEY = 0, 2

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run(q, k, v, self._NO_MASK)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return self._run(q, k, v, self._CAUSAL_TO_THE_LAST_KEY)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, mask_type: int) -> Tensor:
        import torch

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = torch.ops.aten._efficient_attention_forward(
                q, k, v, None, None, None, None, None, 0.0, mask_type
            )[0]
            return out

        return per_picture(q, k, v, kernel)


EFFICIENT = AttentionSpec(
    "efficient",
    "PyTorch's memory-efficient kernel",
    lambda request: Efficient(),
    order=40,
    cost=Cost(two_more, 170 / 989),  # H200: 170 of 989 TFLOP/s
    capability=(5, 0),
    switch="mem_efficient_sdp_enabled",
)
