"""Which device, dtypes, attention and kernels a plan computes with, each with its reason. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import SettingError
from ..hardware.features import VARIABLE
from ..hardware.profile import HardwareProfile
from ..settings import DTYPES
from .attention import UNKNOWN_COST, choose_attention
from .facts import LOSSLESS, ModelFacts
from .memory import Arithmetic, Kernel

SMALL_VALUES = 500_000_000
"""A model with fewer values is small: float32 costs nothing worth saving."""
FIRST_WITH_TRITON_TENSOR_CORES = (8, 0)
BULK_COPIES = 9
"""The major capability whose bulk copies `kernels.swiglu_matmul` is cut for."""
INT8_PRODUCTS = ((6, 1), (7, 5))
"""Capabilities before 8.0 with int8 dot products."""
MATRIX_BACKENDS = ("bitsandbytes", "quanto")

Chosen = tuple[Arithmetic, dict[str, str]]


@dataclass(frozen=True)
class Forced:
    """Settings made by hand; "auto" leaves the choice to the planner. Checked before planning."""

    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    backend: str = "auto"


def arithmetics(facts: ModelFacts, profile: HardwareProfile, forced: Forced) -> Iterator[Chosen]:
    """Ways to compute, the preferred one first; later ones take less memory.

    Raises:
        SettingError: a forced setting is unknown or impossible here.
    """
    reasons: dict[str, str] = {}
    if profile.switched_off:
        reasons["switched off"] = f"{', '.join(profile.switched_off)}, by {VARIABLE}"
    device = _device(profile, forced, reasons)
    for dtype, why in _dtypes(facts, profile, device, forced):
        yield _arithmetic(facts, profile, forced, device, dtype, reasons | {"dtype": why})


def _device(profile: HardwareProfile, forced: Forced, reasons: dict[str, str]) -> str:
    if forced.device == "auto":
        if profile.device == "cuda":
            card = profile.device_name or "the card"
            reasons["device"] = f"{card} as described" if profile.assumed else f"{card} computes correctly"
            return "cuda"
        reasons["device"] = "no CUDA card that PyTorch can use"
        return "cpu"
    kind = forced.device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise SettingError(f"unknown device {forced.device!r}; use auto, cpu or cuda:0")
    if kind == "cuda" and profile.device != "cuda":
        raise SettingError("no CUDA device is usable here; use device cpu, or run lowmem-bagel doctor for the reason")
    reasons["device"] = "asked for"
    return forced.device


def _dtypes(facts: ModelFacts, profile: HardwareProfile, device: str, forced: Forced) -> Iterator[tuple[str, str]]:
    if forced.dtype != "auto":
        if forced.dtype not in DTYPES:
            raise SettingError(f"unknown dtype {forced.dtype!r}; use auto, float32, bfloat16 or float16")
        yield forced.dtype, "asked for"
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


def _arithmetic(
    facts: ModelFacts, profile: HardwareProfile, forced: Forced, device: str, dtype: str, reasons: dict[str, str]
) -> Chosen:
    attention, reasons["attention"] = choose_attention(facts.config.decoder, profile, forced.attention, device, dtype)
    kernel: Kernel = "dense"
    decoded = False
    capability = profile.capability or (0, 0)
    able = device != "cpu" and capability >= FIRST_WITH_TRITON_TENSOR_CORES and _has(profile, "triton")
    fused = able and dtype == "bfloat16"
    stepped = device != "cpu" and _has(profile, "nvrtc") and (dtype == "float16" or (dtype == "bfloat16" and not able))
    if facts.format == "dfloat11":
        why = _why_decoded_at_load(facts, profile, device, dtype, forced)
        decoded = why is not None
        kernel = "dense" if decoded else "decoded at use"
        reasons["linears"] = f"decoded while loading: {why}" if why else "compressed in memory, decoded at every use"
    elif facts.format == "int8":
        kernel, reasons["linears"] = _int8_kernel(capability, device, able, forced)
    elif facts.format == "nf4":
        kernel, reasons["linears"] = "dequantised", "each weight is dequantised, then multiplied"
    else:
        reasons["linears"] = "dense weights" + (", norms and SwiGLU fused by Triton" if fused else "")
    if stepped:
        reasons["around the matmuls"] = "CUDA kernels that NVRTC compiles when the model is loaded"
    elif device != "cpu" and dtype != "float32" and not able:
        reasons["around the matmuls"] = "PyTorch's operations, slower: there is no NVRTC"
    native_vae = dtype == "bfloat16" and device != "cpu" and profile.native_bf16
    reasons["vae_dtype"] = (
        "bfloat16 is native" if native_vae else "float16 would overflow in the VAE" if dtype == "float16" else
        "the VAE is small and exact in float32"
    )  # fmt: skip
    how = Arithmetic(
        device,
        dtype,
        "float32" if dtype == "float16" else dtype,
        "bfloat16" if native_vae else "float32",
        "auto" if attention is None else attention.name,
        kernel,
        fused,
        decoded,
        stepped,
        fused and capability[0] == BULK_COPIES and kernel in ("dense", "decoded at use"),
        UNKNOWN_COST if attention is None else attention.cost,
    )
    return how, reasons


def _has(profile: HardwareProfile, package: str) -> bool:
    """Whether it is there, as far as is known."""
    found = profile.packages.get(package)
    return found is None or found.available


def _why_decoded_at_load(
    facts: ModelFacts, profile: HardwareProfile, device: str, dtype: str, forced: Forced
) -> str | None:
    if forced.backend == "cpu":
        return "asked for"
    if device == "cpu":
        return "the kernel needs a CUDA card"
    if dtype == "float32":
        return "float32 arithmetic was asked for"
    if facts.decoded_at_load is not None:
        return facts.decoded_at_load
    nvrtc = profile.packages.get("nvrtc")
    return None if nvrtc is None or nvrtc.available else f"the kernel cannot be compiled: {nvrtc.reason}"


def _int8_kernel(capability: tuple[int, int], device: str, triton: bool, forced: Forced) -> tuple[Kernel, str]:
    if forced.backend in MATRIX_BACKENDS:
        return "dequantised", "asked for"
    if device == "cpu":
        if forced.backend == "native":
            return "int8 library", "PyTorch's int8 matmul, as asked for"
        return "int8 library", "PyTorch's int8 matmul or dequantised weights, whichever a trial at loading finds faster"
    if triton:
        return "int8 fused", "Triton kernels on int8 tensor cores"
    if capability >= FIRST_WITH_TRITON_TENSOR_CORES or capability in INT8_PRODUCTS:
        return "int8 library", "PyTorch's int8 matmul: Triton has no int8 tensor cores here"
    return "dequantised", "no int8 products on this card: each weight is dequantised, then multiplied"


def is_exact(facts: ModelFacts, how: Arithmetic) -> bool:
    """Whether the weights that are multiplied have the checkpoint's very bits (or are wider)."""
    return facts.format in LOSSLESS and how.dtype in ("bfloat16", "float32")
