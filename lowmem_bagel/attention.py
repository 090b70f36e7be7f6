"""Attention backends behind one signature, each tried on the real device before it is trusted.

    backend(q, k, v, mask) -> o      o = softmax(q @ k.T / sqrt(d)) @ v

q is [B, T, H, d]; k and v are [B, S, KV, d] with H a multiple of KV (query head h reads key/value head h // (H/KV));
o is [B, T, H, d], contiguous, in q's dtype. Any of q, k, v may be a strided view as long as its last dimension is
contiguous, such as a slice of a key/value arena.

The CUDA kernels are called as the operators `scaled_dot_product_attention` dispatches to, not through
`torch.nn.attention.sdpa_kernel`: that context manager switches process-wide flags, so two threads that use it can
leave each other without a kernel. The operators also take a causal block behind a past as it is, without a mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import SettingError


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
    """One way to compute attention; see the module's docstring for the call."""

    name: str

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


class Unavailable(Exception):
    """Raised while a backend is being made: the text is why it cannot be used here."""


@dataclass(frozen=True)
class Request:
    """What a backend is wanted for."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128

    def capability(self) -> tuple[int, int]:
        """The card's compute capability; raises Unavailable where there is no CUDA card."""
        if self.device.type != "cuda":
            raise Unavailable(f"needs a CUDA GPU, not {self.device.type}")
        return torch.cuda.get_device_capability(self.device)

    def require(self, capability: tuple[int, int], dtypes: Collection[torch.dtype] = ()) -> None:
        """Raises Unavailable below `capability`, or for a dtype outside `dtypes` (where any are given)."""
        have = self.capability()
        if have < capability:
            raise Unavailable(
                f"needs compute capability {capability[0]}.{capability[1]}; this card has {have[0]}.{have[1]}"
            )
        if dtypes and self.dtype not in dtypes:
            raise Unavailable(f"does not compute in {_short(self.dtype)}")


_HALVES = (torch.float16, torch.bfloat16)


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


def _per_picture(q: Tensor, k: Tensor, v: Tensor, kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Grouped-query attention through a kernel that wants as many key/value heads as query heads.

    The key/value heads become the kernel's batch, q [KV, T, G, d], k and v [KV, S, G, d] with stride 0 along G:
    K and V are shared by their group without being expanded in memory.
    """
    outputs = []
    for b in range(q.shape[0]):
        kv, group = k.shape[2], q.shape[2] // k.shape[2]
        grouped_q = q[b].view(-1, kv, group, q.shape[3]).transpose(0, 1)
        grouped_k, grouped_v = (x[b].transpose(0, 1).unsqueeze(2).expand(-1, -1, group, -1) for x in (k, v))
        outputs.append(kernel(grouped_q, grouped_k, grouped_v).transpose(0, 1).flatten(1, 2))
    return outputs[0].unsqueeze(0) if len(outputs) == 1 else torch.stack(outputs)


class Selection(NamedTuple):
    """The backend to use, and why each one that was preferred to it (or asked about) was refused."""

    backend: AttentionBackend
    refused: list[tuple[str, str]]


Factory = Callable[[Request], AttentionBackend]


def _make_sdpa(request: Request) -> AttentionBackend:
    return Sdpa()


FACTORIES: Mapping[str, Factory] = {"sdpa": _make_sdpa}
"""Every backend by name; a factory raises Unavailable where its backend cannot run."""


def preference(request: Request) -> Sequence[str]:
    """Backend names to try, best first."""
    return ("sdpa",)


def select_backend(
    name: str = "auto",
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_heads: int = 28,
    num_kv_heads: int = 4,
    head_dim: int = 128,
    disabled: Collection[str] = (),
    factories: Mapping[str, Factory] = FACTORIES,
) -> Selection:
    """The best backend that gives right answers here, or the one called `name`.

    Each candidate is tried with a small call of the given heads on the given device and compared with a float64
    result before it is trusted. `disabled` names backends to treat as absent.

    Raises:
        SettingError: no backend is called `name`, or it cannot run here.
    """
    request = Request(torch.device(device), dtype, num_heads, num_kv_heads, head_dim)
    if name != "auto" and name not in factories:
        raise SettingError(f"unknown attention backend {name!r}; choose auto or one of {', '.join(factories)}")
    refused: list[tuple[str, str]] = []
    for candidate in preference(request) if name == "auto" else (name,):
        outcome = "switched off" if candidate in disabled else try_backend(factories[candidate], request)
        if isinstance(outcome, AttentionBackend):
            return Selection(outcome, refused)
        refused.append((candidate, outcome))
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in refused)
    raise SettingError(f"attention cannot run on {device} in {_short(dtype)} ({reasons}); use --attention auto")


def try_backend(factory: Factory, request: Request) -> AttentionBackend | str:
    """The backend if it is right on the real device, else one line that says why not."""
    try:
        backend = factory(request)
        error = _trial_error(backend, request)
    except Unavailable as reason:
        return str(reason)
    except Exception as failure:  # any failure of a foreign kernel means only: not this one, and why
        return f"{type(failure).__name__}: {_first_line(failure)}"
    limit = 1e-4 if request.dtype == torch.float32 else 2e-2
    return backend if error <= limit else f"wrong result (relative error {error:.1e})"


def _trial_error(backend: AttentionBackend, request: Request) -> float:
    """Largest relative L2 error over a full and a causal block behind a past; infinite if anything is not finite."""
    r, queries, keys = request, 130, 201
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, queries, r.num_heads, r.head_dim, generator=random).to(r.dtype)
    k, v = torch.randn(2, 1, keys, r.num_kv_heads, r.head_dim, generator=random).to(r.dtype)
    worst = 0.0
    for mask in (None, Causal()):
        out = backend(q.to(r.device), k.to(r.device), v.to(r.device), mask).cpu()
        error = relative_error(out, reference_attention(q, k, v, mask))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The definition, in float64, with every score in memory at once: only for small tests."""
    group = q.shape[2] // k.shape[2]
    wide_q, wide_k, wide_v = (x.double().transpose(1, 2) for x in (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (wide_k, wide_v))
    scores = wide_q @ wide_k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask.visible(q.shape[1], k.shape[1], q.device), -math.inf)
    return (scores.softmax(-1) @ wide_v).transpose(1, 2)


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| over all elements, in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(failure: BaseException) -> str:
    return (str(failure).strip().splitlines() or ["no message"])[0][:200]
