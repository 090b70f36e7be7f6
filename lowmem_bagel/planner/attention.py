"""Which attention backend a plan computes with, from what the backends declare. Pure; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..checkpoint.config import DecoderConfig
from ..errors import SettingError
from ..hardware.profile import HardwareProfile
from ..ops.attention.base import PUBLISHED_HEADS
from ..ops.attention.registry import attention_backend, attention_backends, preference
from ..ops.attention.spec import AttentionSpec, Capability, Cost, two_more

UNKNOWN_COST = Cost(two_more, 0.1)
"""Of a backend that is chosen when the model is loaded. Assumed."""


def choose_attention(
    decoder: DecoderConfig, profile: HardwareProfile, wanted: str, device: str, dtype: str, lossy: bool = False
) -> tuple[AttentionSpec | None, str]:
    """The backend, None where only a trial tells which; and why.

    `wanted` is a name, or "auto" for the best, of which one that is lossy is none but where `lossy` says that the
    weights are so anyway.

    Raises:
        SettingError: the wanted one is unknown or cannot run here.
    """
    kind = device.partition(":")[0]
    capability = profile.capability if kind == "cuda" else None
    if wanted != "auto":
        spec = attention_backend(wanted)
        tried = profile.attention_refused.get(spec.name) if kind == profile.device else None
        lacking = (why for name, why in _missing(profile).items() if name in spec.features)
        refused = spec.why_not(kind, capability, dtype) or tried or next(lacking, None)
        if refused is not None:
            raise SettingError(f"attention {spec.name} cannot run here ({refused}); choose attention auto")
        return spec, "asked for"
    if kind == "cpu" and profile.device != "cpu":  # it was not tried
        spec = preference(None)[0]
        return spec, f"{spec.help} on a processor"
    fast = [spec for spec in _best_first(profile, capability) if spec.why_not(kind, capability, dtype) is None]
    able = [spec for spec in fast if lossy or not spec.lossy]
    if not able or (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) != PUBLISHED_HEADS:
        return None, "chosen by trial when the model is loaded"
    where = "this compute capability has" if profile.assumed else "gives right answers here"
    faster = [] if profile.assumed else list(_refusals(profile, capability))
    faster += [f"{spec.name}: lossy, which these weights are not" for spec in fast[: fast.index(able[0])]]
    where += ", and lossy as these weights are" if able[0].lossy else ""
    return able[0], f"the fastest that {where}" + (f" ({'; '.join(faster)})" if faster else "")


def _best_first(profile: HardwareProfile, capability: Capability | None) -> Sequence[AttentionSpec]:
    """What was tried with success; on a machine that is not here, what is declared for it and needs no package."""
    if profile.assumed and not profile.attention:
        off = {*profile.switched_off, *_missing(profile)}
        best = preference(capability, lossy=True)
        return [spec for spec in best if spec.package is None and off.isdisjoint((spec.name, *spec.features))]
    known = attention_backends()
    return [known[name] for name in profile.attention if name in known]


def _missing(profile: HardwareProfile) -> Mapping[str, str]:
    """Packages and features that the machine lacks, with the reasons."""
    return {name: found.reason for name, found in profile.packages.items() if not found.available}


def _refusals(profile: HardwareProfile, capability: Capability | None) -> Sequence[str]:
    """What was tried in vain, but for what is not for this kind of device at all."""
    for_cards = {spec.name for spec in attention_backends().values() if spec.capability is not None}
    refused = profile.attention_refused.items()
    return [f"{name}: {why}" for name, why in refused if capability is not None or name not in for_cards]
