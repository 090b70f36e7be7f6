"""What a hardware profile means for its owner: a verdict, the next command, and what to know. Pure; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..hardware.profile import GIB, VISIBLE, HardwareProfile
from ..hardware.torch_builds import CPU_COMMAND, CUDA_13_COMMAND, CUDA_13_DRIVER, Build, build_for

Level = Literal["ready", "limited", "blocked"]

READY_COMMAND = "lowmem-bagel demo"


@dataclass(frozen=True)
class Diagnosis:
    level: Level
    """ready: the card is used; limited: it runs, but not on a card; blocked: it cannot run."""
    summary: str
    command: str
    """The exact next command to type."""
    notes: tuple[str, ...]


def diagnose(profile: HardwareProfile, ready: str = READY_COMMAND) -> Diagnosis:
    """The verdict on a probed machine; `ready` is the next command where nothing has to be put right first."""
    notes = tuple(_notes(profile))
    if profile.torch_version is None:
        build = _build_for_machine(profile)
        return Diagnosis("blocked", f"PyTorch cannot be imported: {build.why}", build.command or CPU_COMMAND, notes)
    if profile.device == "cuda" and profile.attention:
        arithmetic = (
            "bfloat16" if profile.native_bf16 else "float16 with a float32 residual stream (no native bfloat16)"
        )
        summary = f"{profile.device_name or 'the card'} is ready: {arithmetic}, attention by {profile.attention[0]}"
        return Diagnosis("ready", summary, ready, notes)
    if not profile.attention:
        reasons = "; ".join(f"{name}: {why}" for name, why in profile.attention_refused.items()) or "see the problems"
        command = _build_for_machine(profile).command or CPU_COMMAND
        return Diagnosis("blocked", f"no attention backend gives right answers ({reasons})", command, notes)
    return _without_card(profile, notes, ready)


def _without_card(profile: HardwareProfile, notes: tuple[str, ...], ready: str) -> Diagnosis:
    """torch works, but not on a card: is there one that another build or driver would use?"""
    if profile.platform == "macos":
        return Diagnosis("limited", "macOS: runs on the processor; the Mac's GPU (MPS) is not used", ready, notes)
    if profile.capability is None and not profile.driver_cards:
        return Diagnosis("limited", "no NVIDIA card found: runs on the processor, slowly", ready, notes)
    name = profile.device_name or next((card.name for card in profile.driver_cards), "the card")
    hidden = [problem for problem in profile.problems if problem.startswith(VISIBLE)]
    if hidden and profile.torch_cuda is not None:
        unset = f"set {VISIBLE}=" if profile.platform == "windows" else f"unset {VISIBLE}"
        return Diagnosis("limited", f"{name} is not used: {hidden[0]}", unset, notes)
    build = _build_for_machine(profile)
    if build.command is None:
        return Diagnosis("limited", f"{name} is not used: {build.why}", ready, notes)
    if profile.torch_cuda is None:
        why = f"this PyTorch ({profile.torch_version}) is a CPU build"
    elif profile.torch_has_code is False:
        archs = ", ".join(profile.torch_archs)
        why = f"PyTorch {profile.torch_version} has no code for it (built for {archs})"
    elif _driver_too_old(profile):
        why = f"its driver is too old for PyTorch {profile.torch_version} (CUDA {profile.torch_cuda})"
    else:
        failed = [problem for problem in profile.problems if "card" in problem or "CUDA" in problem]
        why = failed[0] if failed else f"PyTorch {profile.torch_version} does not find it"
    return Diagnosis("limited", f"{name} is not used: {why}; {build.why}", build.command, notes)


def _build_for_machine(profile: HardwareProfile) -> Build:
    seen = profile.driver_cards[0] if profile.driver_cards else None
    capability = profile.capability or (seen.capability if seen else None)
    if capability is not None:
        return build_for(capability, seen.driver_major if seen else None)
    if seen is not None:
        return Build(CUDA_13_COMMAND, f"for {seen.name} (of unknown compute capability) try a CUDA build")
    return Build(CPU_COMMAND, "no NVIDIA card found; install a CPU build")


def _driver_too_old(profile: HardwareProfile) -> bool:
    driver = profile.driver_cards[0].driver_major if profile.driver_cards else None
    built_for_13 = (profile.torch_cuda or "").startswith("13")
    return driver is not None and built_for_13 and driver < CUDA_13_DRIVER


def _notes(profile: HardwareProfile) -> list[str]:
    """What is worth knowing besides the verdict."""
    notes = []
    if profile.platform in ("windows", "wsl2"):
        half = profile.pin_limit / GIB
        notes.append(f"{profile.platform} page-locks about half of RAM at most ({half:.1f} GB): the rest is staged")
    if profile.device == "cuda":
        triton = profile.packages.get("triton")
        if triton is not None and not triton.available and profile.native_bf16:
            package = "; pip install triton-windows" if profile.platform == "windows" else ""
            notes.append(f"no Triton ({triton.reason}): slower kernels are used{package}")
        nvrtc = profile.packages.get("nvrtc")
        if nvrtc is not None and not nvrtc.available:
            notes.append(f"no NVRTC ({nvrtc.reason}): lossless weights are decoded while loading")
        if profile.pinned_gbps and profile.pageable_gbps and profile.pinned_gbps < 1.2 * profile.pageable_gbps:
            notes.append("copies from pinned memory are hardly faster than from pageable memory here")
    elif not profile.native_bf16:
        notes.append("this processor has no bfloat16 arithmetic: float32 is used")
    return notes
