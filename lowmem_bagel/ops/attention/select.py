"""Which attention backend to use: each is tried on the real device before it is trusted.

    backend(q, k, v, mask) -> o

q [B, T, H, d], k and v [B, S, KV, d], o [B, T, H, d]; mask is None (every key is visible) or a `Causal` marker.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import SettingError, first_line
from ...hardware.features import why_off
from ..device import indexed, on
from ..errors import relative_l2
from .base import AttentionBackend, AttentionRequest, Causal, Mask, Unavailable
from .registry import attention_backend, attention_backends, preference
from .spec import AttentionSpec

OUTLIERS = 30.0
"""What keys of real models have been seen to stand off by, in spreads; a lossy backend is tried with such ones, too."""


class Trial(NamedTuple):
    """One call that a backend is tried with, on the host, and its result in float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    expected: Tensor


Trials = dict[float, list[Trial]]
"""By how far channels of the keys stand off: what several backends are tried with for one request, made once."""


class Selection(NamedTuple):
    """The backend to use, and why each one that was preferred to it (or asked about) was refused."""

    backend: AttentionBackend
    refused: list[tuple[str, str]]


def select_backend(
    name: str = "auto",
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_heads: int = 28,
    num_kv_heads: int = 4,
    head_dim: int = 128,
    lossy: bool = False,
    disabled: Collection[str] = (),
) -> Selection:
    """The best backend that gives right answers here, or the one called `name`.

    Each candidate is tried with a small call of the given heads on the given device and compared with a float64
    result before it is trusted. `lossy` says that the weights are lossy anyway, so that a lossy backend may be taken
    unasked; `disabled` names backends to treat as absent.

    Raises:
        SettingError: no backend is called `name`, or it cannot run here.
    """
    request = AttentionRequest(indexed(device), dtype, num_heads, num_kv_heads, head_dim, frozenset(disabled))
    try:
        candidates = preference(request.capability(), lossy) if name == "auto" else [attention_backend(name)]
    except Unavailable as reason:
        raise SettingError(f"attention cannot run on {device}: {reason}; see lowmem-bagel doctor") from None
    refused: list[tuple[str, str]] = []
    trials: Trials = {}
    for candidate in candidates:
        outcome = try_backend(candidate, request, trials)
        if isinstance(outcome, AttentionBackend):
            return Selection(outcome, [*refused, *outcome.refused])
        refused.append((candidate.name, outcome))
    reasons = "; ".join(f"{refusal}: {reason}" for refusal, reason in refused)
    remedy = "choose attention auto" if name != "auto" else "see lowmem-bagel doctor"
    raise SettingError(f"attention cannot run on {device} in {request.dtype_name} ({reasons}); {remedy}")


def select_for_part(name: str, *, device: torch.device, dtype: torch.dtype, num_heads: int, head_dim: int) -> Selection:
    """A backend for the vision tower or the autoencoder, beside a decoder for which `name` was chosen.

    The one called `name` if it is not lossy and runs with these heads too, else the best that does: these parts are in
    float32 where the decoder is in float16, their heads have other sizes, and their weights are the checkpoint's.

    Raises:
        SettingError: nothing runs here.
    """
    request = AttentionRequest(indexed(device), dtype, num_heads, num_heads, head_dim)
    outcome: AttentionBackend | str = ""
    if name != "auto":
        spec = attention_backend(name)
        outcome = "lossy, and not for this part" if spec.lossy else try_backend(spec, request)
    if isinstance(outcome, AttentionBackend):
        return Selection(outcome, list(outcome.refused))
    chosen = select_backend(device=device, dtype=dtype, num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim)
    return Selection(chosen.backend, [*([(name, outcome)] if outcome else []), *chosen.refused])


def try_backend(spec: AttentionSpec, request: AttentionRequest, trials: Trials | None = None) -> AttentionBackend | str:
    """The backend if it is right on the real device, else one line that says why not. `trials` are the request's."""
    trials = {} if trials is None else trials
    off = "switched off" if spec.name in request.disabled else why_off(spec.name)
    if off is not None:
        return off
    try:
        why = spec.why_not(request.device.type, request.capability(), request.dtype_name)
        if why is not None:
            return why
        if spec.switch is not None and not getattr(torch.backends.cuda, spec.switch)():
            return "switched off in torch.backends.cuda"
        backend = spec.made(request, *_companion(spec, request, trials))
        with on(request.device):
            kinds = (0.0, OUTLIERS) if spec.lossy else (0.0,)
            error = max(_trial_error(backend, request, outliers, trials) for outliers in kinds)
    except Unavailable as reason:
        return str(reason)
    except Exception as failure:  # whatever a foreign kernel throws means only: not this one, and why
        return f"{type(failure).__name__}: {first_line(failure)}"
    limit = 1e-4 if request.dtype == torch.float32 else 2e-2
    return backend if error <= limit else f"wrong result (relative error {error:.1e})"


def _companion(spec: AttentionSpec, request: AttentionRequest, trials: Trials) -> Sequence[AttentionBackend]:
    """What takes the calls that the backend leaves: the first that runs of those it names; none if it names none."""
    known = attention_backends() if spec.companions else {}
    for name in spec.companions:
        outcome = try_backend(known[name], request, trials)
        if isinstance(outcome, AttentionBackend):
            return [outcome]
    if spec.companions:
        raise Unavailable("no backend for the small blocks beside it runs here")
    return []


def _trial_error(backend: AttentionBackend, request: AttentionRequest, outliers: float, trials: Trials) -> float:
    """Largest relative L2 error over a full and a causal block behind a past; infinite if anything is not finite."""
    if outliers not in trials:
        trials[outliers] = _trials(request, outliers)
    worst = 0.0
    for q, k, v, mask, expected in trials[outliers]:
        out = backend(q.to(request.device), k.to(request.device), v.to(request.device), mask).cpu()
        worst = max(worst, relative_l2(out, expected))
    return worst


def _trials(r: AttentionRequest, outliers: float) -> list[Trial]:
    """Every eighth channel of the keys stands `outliers` times its spread away from zero, for all tokens alike."""
    queries, keys = 130, 201
    random = torch.Generator().manual_seed(0)
    q = torch.randn(1, queries, r.num_heads, r.head_dim, generator=random).to(r.dtype)
    k, v = torch.randn(2, 1, keys, r.num_kv_heads, r.head_dim, generator=random)
    k[..., ::8] += outliers
    k, v = k.to(r.dtype), v.to(r.dtype)
    return [Trial(q, k, v, mask, reference_attention(q, k, v, mask)) for mask in (None, Causal())]


def reference_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """The definition, in float64, with every score in memory at once: only for small tests."""
    group = q.shape[2] // k.shape[2]
    wide_q, wide_k, wide_v = (x.double().transpose(1, 2) for x in (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (wide_k, wide_v))
    scores = wide_q @ wide_k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask.visible(q.shape[1], k.shape[1], q.device), -math.inf)
    return (scores.softmax(-1) @ wide_v).transpose(1, 2)
