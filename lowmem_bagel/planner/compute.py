"""Which device, dtypes, attention and kernels a plan computes with, each with its reason. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import SettingError
from ..formats.dense.spec import DENSE_WAYS
from ..formats.spec import BY_TRITON, Environment, Way
from ..hardware.features import VARIABLE
from ..hardware.profile import HardwareProfile
from ..settings import DTYPES
from .attention import UNKNOWN_COST, choose_attention
from .facts import ModelFacts
from .memory import ComputeConfig

SMALL_VALUES = 500_000_000
"""A model with fewer values is small: float32 costs nothing worth saving."""

Chosen = tuple[ComputeConfig, dict[str, str]]


@dataclass(frozen=True)
class Overrides:
    """Settings made by hand; "auto" leaves the choice to the planner. Checked before planning."""

    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    backend: str = "auto"
    divide: str = "auto"
    """What several cards share; see `settings.DIVISIONS`."""


def compute_configs(facts: ModelFacts, profile: HardwareProfile, overrides: Overrides) -> Iterator[Chosen]:
    """Ways to compute, the preferred one first; later ones take less memory.

    Raises:
        SettingError: a setting made by hand is unknown or impossible here.
    """
    reasons: dict[str, str] = {}
    if profile.switched_off:
        reasons["switched off"] = f"{', '.join(profile.switched_off)}, by {VARIABLE}"
    device = _device(profile, overrides, reasons)
    for dtype, why in _dtypes(facts, profile, device, overrides):
        yield _compute_config(facts, profile, overrides, device, dtype, reasons | {"dtype": why})


def _device(profile: HardwareProfile, overrides: Overrides, reasons: dict[str, str]) -> str:
    if overrides.device == "auto":
        if profile.device == "cuda":
            card = profile.device_name or "the card"
            reasons["device"] = f"{card} as described" if profile.assumed else f"{card} computes correctly"
            return "cuda"
        reasons["device"] = "no CUDA card that PyTorch can use"
        return "cpu"
    kind = overrides.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise SettingError(f"unknown device {overrides.device!r}; use auto, cpu or cuda:0")
    if kind == "cuda" and profile.device != "cuda":
        raise SettingError("no CUDA device is usable here; use device cpu, or run lowmem-bagel doctor for the reason")
    reasons["device"] = "asked for"
    return overrides.device


def _dtypes(
    facts: ModelFacts, profile: HardwareProfile, device: str, overrides: Overrides
) -> Iterator[tuple[str, str]]:
    if overrides.dtype != "auto":
        if overrides.dtype not in DTYPES:
            raise SettingError(f"unknown dtype {overrides.dtype!r}; use auto, float32, bfloat16 or float16")
        yield overrides.dtype, "asked for"
    elif device != "cpu":
        if profile.native_bf16:
            yield "bfloat16", "the model's own, and native on this card"
        else:
            loss = " (values of the weights are kept inside float16's normal range)" if facts.lossless else ""
            yield "float16", f"no native bfloat16 on this card; the residual stream is float32{loss}"
    elif facts.values < SMALL_VALUES:
        yield "float32", "the model is small"
    elif profile.native_bf16:
        yield "bfloat16", "the model's own, and native on this processor"
    else:
        yield "float32", "this processor has no bfloat16 arithmetic"
        yield "bfloat16", "emulated and slow, but float32 weights do not fit in RAM"


def _compute_config(
    facts: ModelFacts, profile: HardwareProfile, overrides: Overrides, device: str, dtype: str, reasons: dict[str, str]
) -> Chosen:
    attention, reasons["attention"] = choose_attention(
        facts.config.decoder, profile, overrides.attention, device, dtype, facts.spec.inexact
    )
    here = environment(facts, profile, device, dtype)
    way, reasons["linears"] = first_way(tuple(facts.spec.ways_by(overrides.backend)), here, overrides)
    dense, _ = first_way(DENSE_WAYS, here, replace(overrides, backend="auto"))
    if here.around == "cuda":
        reasons["around the matmuls"] = "CUDA kernels that NVRTC compiles when the model is loaded"
    elif device != "cpu" and dtype != "float32" and BY_TRITON.unmet(here) is not None:
        reasons["around the matmuls"] = "PyTorch's operations, slower: there is no NVRTC"
    native_vae = dtype == "bfloat16" and device != "cpu" and profile.native_bf16
    reasons["vae_dtype"] = (
        "bfloat16 is native" if native_vae else "float16 would overflow in the VAE" if dtype == "float16" else
        "the VAE is small and exact in float32"
    )  # fmt: skip
    how = ComputeConfig(
        device,
        dtype,
        "float32" if dtype == "float16" else dtype,
        "bfloat16" if native_vae else "float32",
        "auto" if attention is None else attention.name,
        way,
        here.around,
        dense.swiglu_in_matmul,
        UNKNOWN_COST if attention is None else attention.cost.on(profile.capability if device != "cpu" else None),
    )
    return how, reasons


def environment(facts: ModelFacts, profile: HardwareProfile, device: str, dtype: str) -> Environment:
    """What ways are chosen by, of a machine's profile; what is not known to be missing is there."""
    packages = {name: found.reason for name, found in profile.packages.items() if not found.available}
    capability = (profile.capability or (0, 0)) if device != "cpu" else (0, 0)
    return Environment(device.partition(":")[0], dtype, capability, {**packages, **facts.missing})


def first_way(ways: Sequence[Way], here: Environment, overrides: Overrides) -> tuple[Way, str]:
    """The first way that this machine does not rule out, and what a plan says of it.

    Raises:
        SettingError: all are ruled out.
    """
    refused: list[str] = []
    for way in ways:
        why = way.requires.unmet(here)
        if why is None:
            return way, way.says.format(why=refused[0] if refused else "asked for")
        refused.append(why)
    raise SettingError(f"backend {overrides.backend} cannot run here ({'; '.join(refused)}); choose backend auto")


def is_exact(facts: ModelFacts, how: ComputeConfig) -> bool:
    """Whether the weights that are multiplied have the checkpoint's very bits (or are wider)."""
    return facts.lossless and (how.dtype == "float32" or (how.dtype == "bfloat16" and not facts.wider))
