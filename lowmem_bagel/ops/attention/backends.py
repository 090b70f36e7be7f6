"""The ways to compute attention, all behind one call; `attention.py` finds out which of them run here.

The CUDA kernels are called as the operators `scaled_dot_product_attention` dispatches to, not through
`torch.nn.attention.sdpa_kernel`: that context manager switches process-wide flags, so two threads that use it can
leave each other without a kernel. The operators also take a causal block behind a past as it is, without a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Causal:
    """Marks a block whose T queries are the last T keys: query i sees all keys before it, and its own.

    Make one per prefill and hand it to every layer: the mask that some backends need is built once and kept here.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Boolean [queries, keys], True where the query sees the key."""
        if self._mask is None or self._mask.shape != (queries, keys) or self._mask.device != device:
            everything = torch.ones(queries, keys, dtype=torch.bool, device=device)
            self._mask = everything.tril(diagonal=keys - queries)
        return self._mask


Mask = Causal | None


class AttentionBackend:
    """One way to compute o = softmax(q @ k.T / sqrt(d)) @ v.

    q is [B, T, H, d]; k and v are [B, S, KV, d] with H a multiple of KV (query head h reads key/value head
    h // (H/KV)); o is [B, T, H, d], contiguous, in q's dtype. q, k and v may be strided views whose last dimension is
    contiguous, such as slices of a key/value arena.
    """

    name: str
    refused: tuple[tuple[str, str], ...] = ()
    """Faster ways inside this backend that cannot be used here, and why."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        queries, keys = q.shape[1], k.shape[1]
        assert q.shape[2] % k.shape[2] == 0, "query heads must be a multiple of the key/value heads"
        if mask is None or queries == 1:
            return self._full(q, k, v).contiguous()
        assert queries <= keys, "a causal block's own keys are part of the keys"
        return self._causal(q, k, v, mask).contiguous()

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        raise NotImplementedError


class Sdpa(AttentionBackend):
    """PyTorch's own choice: on the CPU its flash kernel, elsewhere whatever the device has."""

    name = "sdpa"

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run(q, k, v, None, False)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        if q.shape[1] == k.shape[1]:
            return self._run(q, k, v, None, True)
        return self._run(q, k, v, mask.visible(q.shape[1], k.shape[1], q.device), False)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, causal: bool) -> Tensor:
        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal).transpose(1, 2)

        return _per_picture(q, k, v, kernel)


class Flash(AttentionBackend):
    """PyTorch's flash kernel (FlashAttention 2). Grouped heads and causal blocks behind a past are its own."""

    name = "flash"

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run(q, k, v, False)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return self._run(q, k, v, True)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]
        return out.transpose(1, 2)


class Efficient(AttentionBackend):
    """PyTorch's memory-efficient kernel: every card since Maxwell, every dtype."""

    name = "efficient"
    _NO_MASK, _CAUSAL_TO_THE_LAST_KEY = 0, 2

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run(q, k, v, self._NO_MASK)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return self._run(q, k, v, self._CAUSAL_TO_THE_LAST_KEY)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, mask_type: int) -> Tensor:
        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = torch.ops.aten._efficient_attention_forward(
                q, k, v, None, None, None, None, None, 0.0, mask_type
            )[0]
            return out

        return _per_picture(q, k, v, kernel)


class Cudnn(AttentionBackend):
    """cuDNN's kernel for large full blocks, the fastest on Hopper; `companion` takes the rest.

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
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
        return out.transpose(1, 2)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return self.companion(q, k, v, mask)


class FlashAttnPackage(AttentionBackend):
    """The separately installed flash_attn package; its causal mask ends at the last key since version 2.1."""

    name = "flash-attn"

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._function(q, k, v)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        return self._function(q, k, v, causal=True)


class Plain(AttentionBackend):
    """PyTorch's math kernel: every score in memory at once."""

    name = "math"

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._run(q, k, v, None)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        visible = mask.visible(q.shape[1], k.shape[1], q.device)
        bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -math.inf)
        return self._run(q, k, v, bias)

    def _run(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out: Tensor = torch.ops.aten._scaled_dot_product_attention_math(q, k, v, bias)[0]
            return out.transpose(1, 2)

        return _per_picture(q, k, v, kernel)


Products = Callable[[Tensor, Tensor], Tensor]
"""a [N, M, K] @ b [N, K, L] -> float32 [N, M, L], accumulated in float32; a may be wider than b."""


def upcast_products(a: Tensor, b: Tensor) -> Tensor:
    """For any device and dtype."""
    return torch.bmm(a.float(), b.float())


def tensor_core_products(a: Tensor, b: Tensor) -> Tensor:
    """Operands in b's 16 bits: CUDA with torch 2.8 or newer."""
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


def _per_picture(q: Tensor, k: Tensor, v: Tensor, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Grouped-query attention through a kernel that wants as many key/value heads as query heads.

    The key/value heads become the kernel's batch, q [KV, T, G, d], k and v [KV, S, G, d] with stride 0 along G:
    a group shares its K and V without expanding them in memory.
    """
    group = q.shape[2] // k.shape[2]
    outputs = []
    for b in range(q.shape[0]):
        grouped_q = q[b].view(-1, k.shape[2], group, q.shape[3]).transpose(0, 1)
        grouped_k, grouped_v = (x[b].transpose(0, 1).unsqueeze(2).expand(-1, -1, group, -1) for x in (k, v))
        outputs.append(kernel(grouped_q, grouped_k, grouped_v).transpose(0, 1).flatten(1, 2))
    return outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs)
