"""PyTorch's math kernel: every score in memory at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .base import AttentionBackend, Causal, per_picture
from .spec import AttentionSpec, Call, Cost

if TYPE_CHECKING:
    from torch import Tensor


COPIES = 4
"""float32 copies of the keys of every query head that its products make on a card."""


class Plain(AttentionBackend):
    """For any device and dtype; memory grows with the square of the tokens."""

    name = "math"

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run(q, k, v, None)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        import torch

        visible = mask.visible(q.shape[1], k.shape[1], q.device)
        bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -math.inf)
        return self._run(q, k, v, bias)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        import torch

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, bias)[0]
            return out.transpose(1, 2)

        return per_picture(q, k, v, kernel)


def scratch(call: Call) -> int:
    """Scores and their softmax in float32; where the arithmetic is half, also what is widened: keys and values of every
    query head, the queries and what comes out. On a card keys and values of every query head are copied for the
    products, too: 172 MB more than counted alive elsewhere, at 3000 keys on an H200."""
    width = call.heads * call.head_dim
    widened = (3 * call.tokens + 4 * call.keys) * width * call.itemsize if call.itemsize == 2 else 0
    return 2 * 4 * call.heads * call.tokens * call.keys + widened + COPIES * 4 * call.keys * width


MATH = AttentionSpec(
    "math",
    "every score in memory at once",
    lambda request: Plain(),
    order=60,
    cost=Cost(scratch, 24 / 989),  # H200: 24 of 989 TFLOP/s
)
