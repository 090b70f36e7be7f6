"""PyTorch's own choice of kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import AttentionBackend, Causal, per_picture
from .spec import AttentionSpec, Cost, two_more

if TYPE_CHECKING:
    from torch import Tensor


class Sdpa(AttentionBackend):
    """On the CPU PyTorch's flash kernel, elsewhere whatever the device has."""

    name = "sdpa"

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run(q, k, v, None, False)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        if q.shape[1] == k.shape[1]:
            return self._run(q, k, v, None, True)
        return self._run(q, k, v, mask.visible(q.shape[1], k.shape[1], q.device), False)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
        import torch.nn.functional as F

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal).transpose(1, 2)

        return per_picture(q, k, v, kernel)


SDPA = AttentionSpec(
    "sdpa",
    "PyTorch's own choice",
    lambda request: Sdpa(),
    order=0,
    cost=Cost(two_more, 170 / 989),  # assumed like the slowest of its fused kernels, `efficient`
    unasked_on_cards=False,
)
