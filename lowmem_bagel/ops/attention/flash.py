"""PyTorch's flash kernel (FlashAttention 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import AttentionBackend, Causal
from .spec import HALVES, AttentionSpec, Cost, one_more

if TYPE_CHECKING:
    from torch import Tensor


class Flash(AttentionBackend):
    """Grouped heads and causal blocks behind a past are the kernel's own."""

    name = "flash"

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run(q, k, v, False)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return self._run(q, k, v, True)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        import torch

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]
        return out.transpose(1, 2)


FLASH = AttentionSpec(
    "flash",
    "PyTorch's FlashAttention 2",
    lambda request: Flash(),
    order=30,
    cost=Cost(one_more, 350 / 989),  # H200: 350 of 989 TFLOP/s
    capability=(8, 0),
    dtypes=HALVES,
    switch="flash_sdp_enabled",
)
