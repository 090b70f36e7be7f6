"""Online softmax over blocks of queries and keys, by plain matmuls: for whatever has no fused kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...errors import first_line
from .base import AttentionBackend, AttentionRequest, Causal
from .spec import HALVES, AttentionSpec, Call, Cost

if TYPE_CHECKING:
    from torch import Tensor

Products = Callable[["Tensor", "Tensor"], "Tensor"]
"""a [N, M, K] @ b [N, K, L] -> float32 [N, M, L], accumulated in float32; a may be wider than b."""


def upcast_products(a: Tensor, b: Tensor) -> Tensor:
    """For any device and dtype."""
    import torch

    return torch.bmm(a.float(), b.float())


def tensor_core_products(a: Tensor, b: Tensor) -> Tensor:
    """Operands in b's 16 bits: CUDA with torch 2.8 or newer."""
    import torch

    return torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32)


class Chunked(AttentionBackend):
    """Online softmax in float32 over blocks of queries and keys: plain matmuls, memory linear in the tokens.

    Follows the recurrence of "Self-attention Does Not Need O(n^2) Memory" (arXiv 2112.05682). On tensor cores
    the weights, which are at most 1, are rounded to 16 bits before they meet the values, as in FlashAttention: an error
    of at most half a unit in the last place of each.
    """

    name = "chunked"
    KEYS = 2048
    SCORE_BYTES = 16 << 20
    """Scores of one block, all heads; about twice as much is in use at a time."""

    def __init__(self, products: Products = upcast_products, refused: tuple[tuple[str, str], ...] = ()) -> None:
        self._products, self.refused = products, refused

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run(q, k, v, False)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return self._run(q, k, v, True)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        import torch

        batch, queries, heads, _ = q.shape
        keys = k.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        step = max(1, self.SCORE_BYTES // (4 * batch * heads * min(keys, self.KEYS)))
        for start in range(0, queries, step):
            block = slice(start, min(start + step, queries))
            past = keys - queries + start if causal else None
            out[:, block] = self._block(q[:, block], k, v, past)
        return out

    def _block(self, q: Tensor, k: Tensor, v: Tensor, past: int | None) -> Tensor:
        """One block of queries; where `past` is given, query i sees keys up to past + i."""
        import torch

        batch, rows, heads, width = q.shape
        kv = k.shape[2]
        grouped = q.reshape(batch, rows, kv, heads // kv, width).permute(0, 2, 3, 1, 4).reshape(batch * kv, -1, width)
        visible_keys = k.shape[1] if past is None else past + rows
        mixed = torch.zeros(grouped.shape, dtype=torch.float32, device=q.device)
        total = mixed.new_zeros((*mixed.shape[:-1], 1))
        highest = torch.full_like(total, -math.inf)
        for start in range(0, visible_keys, self.KEYS):
            part = slice(start, min(start + self.KEYS, visible_keys))
            part_k, part_v = (x[:, part].transpose(1, 2).flatten(0, 1) for x in (k, v))
            scores = self._products(grouped, part_k.mT).div_(math.sqrt(width))
            if past is not None and part.stop > past + 1:
                key = torch.arange(part.start, part.stop, device=q.device)
                last = torch.arange(past, past + rows, device=q.device)
                per_row = scores.view(batch, kv, heads // kv, rows, -1)
                per_row.masked_fill_(key > last[:, None], -math.inf)
            new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
            fade = highest.sub_(new_highest).exp_()
            weights = scores.sub_(new_highest).exp_()
            total.mul_(fade).add_(weights.sum(-1, keepdim=True))
            mixed.mul_(fade).add_(self._products(weights, part_v))
            highest = new_highest
            del scores, weights  # before the next ones are made
        result = mixed.div_(total).view(batch, kv, heads // kv, rows, width)
        return result.permute(0, 3, 1, 2, 4).reshape(q.shape)


def make(request: AttentionRequest) -> AttentionBackend:
    """With 16-bit products where they give the right result."""
    import torch

    if request.device.type == "cpu" or request.dtype_name not in HALVES:
        return Chunked()
    probe = torch.ones(1, 16, 16, dtype=request.dtype, device=request.device)
    try:
        works = bool((tensor_core_products(probe, probe) == 16).all())
        reason = "wrong result"
    except (TypeError, RuntimeError) as error:
        works, reason = False, first_line(error)
    if works:
        return Chunked(tensor_core_products)
    return Chunked(refused=((f"chunked with {request.dtype_name} products", reason),))


def scratch(call: Call) -> int:
    """Scores, their softmax and what is between; a block's keys and values in float32."""
    return 3 * Chunked.SCORE_BYTES + 2 * 4 * Chunked.KEYS * call.kv_heads * call.head_dim


CHUNKED = AttentionSpec(
    "chunked",
    "softmax by blocks, with plain matmuls",
    make,
    order=50,
    cost=Cost(scratch, 0.3, of="float32"),  # assumed
)
