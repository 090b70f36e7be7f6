"""What an attention backend is: one way to compute attention, all behind one call. Importing this needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor


class Causal:
    """Marks a block whose T queries are the last T keys: query i sees all keys before it, and its own.

    Make one per prefill and hand it to every layer: the mask that some backends need is built once and kept here.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def visible(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Boolean [queries, keys], True where the query sees the key."""
        import torch

        if self._mask is None or self._mask.shape != (queries, keys) or self._mask.device != device:
            everything = torch.ones(queries, keys, dtype=torch.bool, device=device)
            self._mask = everything.tril(diagonal=keys - queries)
        return self._mask


Mask = Causal | None


class AttentionBackend:
    """One way to compute o = softmax(q @ k.T / sqrt(d)) @ v.

    q is [B, T, H, d]; k and v are [B, S, KV, d] with H a multiple of KV (query head h reads key/value head
    h // (H/KV)); o is [B, T, H, d], contiguous, in q's dtype. q, k and v may be strided views whose last dimension is
    contiguous, such as slices of a key/value cache. A subclass gives `name`, `_full` and `_causal`.

    The CUDA kernels are called as the operators `scaled_dot_product_attention` dispatches to, not through
    `torch.nn.attention.sdpa_kernel`: that context manager switches process-wide flags, so two threads that use it can
    leave each other without a kernel. The operators also take a causal block behind a past as it is, without a mask.
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
        """Every query sees every key."""
        raise NotImplementedError

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, mask: Causal) -> Tensor:
        """A block behind a past, as `Causal` says."""
        raise NotImplementedError


class Unavailable(Exception):
    """Raised while a backend is being made: the text is why it cannot be used here."""


PUBLISHED_HEADS = (28, 4, 128)
"""Query heads, key/value heads and head size of the published model: what a machine is probed with."""


@dataclass(frozen=True)
class AttentionRequest:
    """What a backend is wanted for."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int = PUBLISHED_HEADS[0]
    num_kv_heads: int = PUBLISHED_HEADS[1]
    head_dim: int = PUBLISHED_HEADS[2]
    disabled: frozenset[str] = frozenset()
    """Names of backends to treat as absent."""

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def capability(self) -> tuple[int, int] | None:
        """The card's compute capability, None where the device is no card; raises Unavailable where it is not there."""
        import torch

        if self.device.type != "cuda":
            return None
        if not torch.cuda.is_available():
            raise Unavailable("torch finds no CUDA GPU")
        return torch.cuda.get_device_capability(self.device)


def per_picture(q: Tensor, k: Tensor, v: Tensor, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Grouped-query attention through a kernel that wants as many key/value heads as query heads.

    The key/value heads become the kernel's batch, q [KV, T, G, d], k and v [KV, S, G, d] with stride 0 along G:
    a group shares its K and V without expanding them in memory.
    """
    import torch

    group = q.shape[2] // k.shape[2]
    outputs = []
    for b in range(q.shape[0]):
        grouped_q = q[b].view(-1, k.shape[2], group, q.shape[3]).transpose(0, 1)
        grouped_k, grouped_v = (x[b].transpose(0, 1).unsqueeze(2).expand(-1, -1, group, -1) for x in (k, v))
        outputs.append(kernel(grouped_q, grouped_k, grouped_v).transpose(0, 1).flatten(1, 2))
    return outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs)
