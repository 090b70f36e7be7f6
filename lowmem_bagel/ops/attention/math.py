"""PyTorch's math kernel: every score in memory at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .base import AttentionBackend, Causal, per_picture
from .spec import AttentionSpec, Call, Cost

if TYPE_CHECKING:
    from torch import Tensor


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
    query head, the queries and what comes out."""
    widened = (3 * call.tokens + 4 * call.keys) * call.heads * call.head_dim * call.itemsize
    return 2 * 4 * call.heads * call.tokens * call.keys + (widened if call.itemsize == 2 else 0)


MATH = AttentionSpec(
    "math",
    "every score in memory at once",
    lambda request: Plain(),
    order=60,
    cost=Cost(scratch, 24 / 989),  # H200: 24 of 989 TFLOP/s
)
