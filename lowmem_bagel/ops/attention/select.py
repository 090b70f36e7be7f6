"""Which attention backend to use: each is tried on the real device before it is trusted.

    backend(q, k, v, mask) -> o

q [B, T, H, d], k and v [B, S, KV, d], o [B, T, H, d]; mask is None (every key is visible) or a `Causal` marker.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import SettingError
from ...hardware.features import why_off
from ..device import indexed, on
from ..errors import relative_l2
from .backends import (
    AttentionBackend,
    Causal,
    Chunked,
    Cudnn,
    Efficient,
    Flash,
    FlashAttnPackage,
    Mask,
    Plain,
    Sdpa,
    tensor_core_products,
)

__all__ = [
    "FACTORIES",
    "AttentionBackend",
    "Causal",
    "Mask",
    "Request",
    "Selection",
    "Unavailable",
    "preference",
    "reference_attention",
    "select_backend",
    "select_for_part",
    "try_backend",
]


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
    disabled: frozenset[str] = frozenset()
    """Names of backends to treat as absent."""

    def capability(self) -> tuple[int, int]:
        """The card's compute capability; raises Unavailable where there is no CUDA card."""
        if self.device.type != "cuda":
            raise Unavailable(f"needs a CUDA GPU, not {self.device.type}")
        if not torch.cuda.is_available():
            raise Unavailable("torch finds no CUDA GPU")
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


class Selection(NamedTuple):
    """The backend to use, and why each one that was preferred to it (or asked about) was refused."""

    backend: AttentionBackend
    refused: list[tuple[str, str]]


Factory = Callable[[Request], AttentionBackend]

_HALVES = (torch.float16, torch.bfloat16)


def _make_flash_attn(request: Request) -> AttentionBackend:
    request.require((8, 0), _HALVES)
    try:
        flash_attn = importlib.import_module("flash_attn")
    except ImportError as error:
        raise Unavailable(f"the flash_attn package cannot be imported ({_first_line(error)})") from error
    return FlashAttnPackage(flash_attn.flash_attn_func)


def _make_cudnn(request: Request) -> AttentionBackend:
    request.require((8, 0), _HALVES)
    _require_switch(torch.backends.cuda.cudnn_sdp_enabled)
    for name in ("flash", "efficient", "chunked"):
        companion = try_backend(name, request)
        if isinstance(companion, AttentionBackend):
            return Cudnn(companion)
    raise Unavailable("no backend for the small blocks beside it runs here")


def _make_flash(request: Request) -> AttentionBackend:
    request.require((8, 0), _HALVES)
    _require_switch(torch.backends.cuda.flash_sdp_enabled)
    return Flash()


def _make_efficient(request: Request) -> AttentionBackend:
    request.require((5, 0))
    _require_switch(torch.backends.cuda.mem_efficient_sdp_enabled)
    return Efficient()


def _make_chunked(request: Request) -> AttentionBackend:
    if request.device.type == "cpu" or request.dtype not in _HALVES:
        return Chunked()
    probe = torch.ones(1, 16, 16, dtype=request.dtype, device=request.device)
    try:
        works = bool((tensor_core_products(probe, probe) == 16).all())
        reason = "wrong result"
    except (TypeError, RuntimeError) as error:
        works, reason = False, _first_line(error)
    if works:
        return Chunked(tensor_core_products)
    return Chunked(refused=((f"chunked with {_short(request.dtype)} products", reason),))


def _require_switch(enabled: Callable[[], bool]) -> None:
    if not enabled():
        raise Unavailable("switched off in torch.backends.cuda")


FACTORIES: Mapping[str, Factory] = {
    "flash-attn": _make_flash_attn,
    "cudnn": _make_cudnn,
    "flash": _make_flash,
    "efficient": _make_efficient,
    "sdpa": lambda request: Sdpa(),
    "chunked": _make_chunked,
    "math": lambda request: Plain(),
}
"""Every backend by name; a factory raises Unavailable where its backend cannot run."""

_HOPPER_AND_DATACENTRE_BLACKWELL = (9, 10)


def preference(request: Request) -> Sequence[str]:
    """Backend names to try, fastest first.

    On an H200 with 4098 tokens cuDNN ran at 569 TFLOP/s, flash at 350, memory-efficient at 170, math at 24.
    """
    if request.device.type != "cuda":
        return "sdpa", "chunked", "math"
    if request.capability()[0] in _HOPPER_AND_DATACENTRE_BLACKWELL:
        return "cudnn", "flash-attn", "flash", "efficient", "chunked", "math"
    return "flash-attn", "cudnn", "flash", "efficient", "chunked", "math"


def select_backend(
    name: str = "auto",
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_heads: int = 28,
    num_kv_heads: int = 4,
    head_dim: int = 128,
    disabled: Collection[str] = (),
) -> Selection:
    """The best backend that gives right answers here, or the one called `name`.

    Each candidate is tried with a small call of the given heads on the given device and compared with a float64
    result before it is trusted. `disabled` names backends to treat as absent.

    Raises:
        SettingError: no backend is called `name`, or it cannot run here.
    """
    request = Request(indexed(device), dtype, num_heads, num_kv_heads, head_dim, frozenset(disabled))
    if name != "auto" and name not in FACTORIES:
        raise SettingError(f"unknown attention backend {name!r}; choose auto or one of {', '.join(FACTORIES)}")
    try:
        candidates = preference(request) if name == "auto" else (name,)
    except Unavailable as reason:
        raise SettingError(f"attention cannot run on {device}: {reason}; see lowmem-bagel doctor") from None
    refused: list[tuple[str, str]] = []
    for candidate in candidates:
        outcome = try_backend(candidate, request)
        if isinstance(outcome, AttentionBackend):
            return Selection(outcome, [*refused, *outcome.refused])
        refused.append((candidate, outcome))
    reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in refused)
    remedy = "choose attention auto" if name != "auto" else "see lowmem-bagel doctor"
    raise SettingError(f"attention cannot run on {device} in {_short(dtype)} ({reasons}); {remedy}")


def select_for_part(name: str, *, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int) -> Selection:
    """A backend for the vision tower or the autoencoder, beside a decoder for which `name` was chosen.

    The one called `name` if it runs with these heads too, else the best that does: these parts are in float32 where
    the decoder is in float16, and their heads have other sizes.

    Raises:
        SettingError: nothing runs here.
    """
    request = Request(indexed(device), dtype, num_heads, num_heads, head_dim)
    outcome = try_backend(name, request) if name != "auto" else ""
    if isinstance(outcome, AttentionBackend):
        return Selection(outcome, list(outcome.refused))
    chosen = select_backend(device=device, dtype=dtype, num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim)
    return Selection(chosen.backend, [*([(name, outcome)] if outcome else []), *chosen.refused])


def try_backend(name: str, request: Request) -> AttentionBackend | str:
    """The backend if it is right on the real device, else one line that says why not."""
    off = "switched off" if name in request.disabled else why_off(name)
    if off is not None:
        return off
    try:
        backend = FACTORIES[name](request)
        with on(request.device):
            error = _trial_error(backend, request)
    except Unavailable as reason:
        return str(reason)
    except Exception as failure:  # whatever a foreign kernel throws means only: not this one, and why
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
        worst = max(worst, relative_l2(out, reference_attention(q, k, v, mask)))
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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(failure: BaseException) -> str:
    return (str(failure).strip().splitlines() or ["no message"])[0][:200]
