"""This machine, probed into a hardware profile.

Importing this needs no torch; `probe` imports it inside. Kernels are chosen by capability and trial, so nothing here
decides by a card's name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..formats.registry import packages as backend_packages
from ..hardware import host
from ..hardware.features import why_off
from ..hardware.profile import FIRST_NATIVE_BF16, VISIBLE, Availability, HardwareProfile, as_switched
from ..hardware.torch_builds import covers
from ..ops.attention.registry import attention_backends, preference

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def probe(
    measure: bool = True, disk_path: Path | None = None, card: int = 0, for_advice: bool = True
) -> HardwareProfile:
    """This machine. Never raises: what cannot be found out keeps its default and is named in `problems`.

    `measure` also times copies to the card and, where `disk_path` is given, reading from it: about two seconds. Of
    several cards it looks at the one with the number `card`. `for_advice` also finds what matters to advice alone, in
    another second or two: what the driver's own tool says, and attention backends that no plan would choose unasked.
    """
    notes = _Notes()
    profile = _probe_host(notes)
    if for_advice:
        profile = replace(profile, driver_cards=tuple(notes.attempt("nvidia-smi", host.driver_cards, [])))
    torch_module = notes.attempt("torch", lambda: importlib.import_module("torch"), None)
    if torch_module is not None:
        profile = _probe_torch(notes, profile, torch_module, card, every=for_advice)
        if profile.device == "cuda" and measure:
            profile = replace(
                profile,
                pinned_gbps=notes.attempt("pinned copy speed", lambda: copy_speed(True, profile.vram_free, card), None),
                pageable_gbps=notes.attempt(
                    "pageable copy speed", lambda: copy_speed(False, profile.vram_free, card), None
                ),
            )
    if measure and disk_path is not None:
        speed = notes.attempt("disk speed", lambda: host.disk_read_speed(disk_path), None)
        profile = replace(profile, disk_gbps=speed)
    for_attention = {spec.name: spec.package for spec in attention_backends().values() if spec.package}
    packages = {name: _package(notes, *where) for name, where in {**backend_packages(), **for_attention}.items()}
    packages |= {
        "triton": _tried(notes, "triton", profile, card, why_no_triton),
        "nvrtc": _tried(notes, "nvrtc", profile, card, why_no_nvrtc),
    }
    return as_switched(replace(profile, packages=packages, problems=tuple(notes.problems)))


class _Notes:
    """Runs probes that may fail in any way on somebody's machine, and keeps why."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def attempt(self, what: str, probe: Callable[[], T], otherwise: T) -> T:
        try:
            return probe()
        except Exception as failure:  # the purpose of a probe: any failure is a finding
            self.problems.append(f"{what}: {describe(failure)}")
            return otherwise


def describe(failure: BaseException) -> str:
    """One line for an exception."""
    text = " ".join(str(failure).split())[:200]
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__


def _probe_host(notes: _Notes) -> HardwareProfile:
    default: host.Platform = "linux"
    unknown: tuple[str, tuple[str, ...]] = ("", ())
    kind = notes.attempt("platform", host.current_platform, default)
    ram = notes.attempt("memory", host.memory, host.Memory(0, 0))
    name, features = notes.attempt("processor", lambda: host.processor(), unknown)
    return HardwareProfile(
        platform=kind,
        ram_total=ram.total,
        ram_available=ram.available,
        cpu_name=name,
        cpu_features=features,
        cores=notes.attempt("cores", host.cores, 1),
        native_bf16=bool(host.BF16_FEATURES.intersection(features)),
    )


def _probe_torch(notes: _Notes, profile: HardwareProfile, torch: Any, card: int, every: bool) -> HardwareProfile:
    profile = replace(
        profile,
        torch_version=notes.attempt("torch's version", lambda: str(torch.__version__), None),
        torch_cuda=notes.attempt("torch's CUDA version", lambda: torch.version.cuda, None),
    )
    if notes.attempt("CUDA", lambda: bool(torch.cuda.is_available()), False):
        profile = _probe_card(notes, profile, torch, card)
    elif VISIBLE in os.environ:
        notes.problems.append(f"{VISIBLE}={os.environ[VISIBLE]} decides which cards PyTorch sees")
    profile = as_switched(profile)
    dtype = "bfloat16" if profile.native_bf16 else "float16" if profile.device == "cuda" else "float32"
    nothing: tuple[tuple[str, ...], dict[str, str]] = ((), {})
    device = f"cuda:{card}" if profile.device == "cuda" else "cpu"
    running, refused = notes.attempt("attention", lambda: try_attention(device, dtype, every), nothing)
    return replace(profile, attention=running, attention_refused=refused, attention_dtype=dtype)


def _probe_card(notes: _Notes, profile: HardwareProfile, torch: Any, card: int) -> HardwareProfile:
    """Adds a card, as the device only if a computation on it comes out right."""
    name = notes.attempt("card's name", lambda: str(torch.cuda.get_device_name(card)), "")
    capability = notes.attempt("compute capability", lambda: torch.cuda.get_device_capability(card), None)
    unknown: tuple[str, ...] = ()
    archs = notes.attempt("torch's architectures", lambda: tuple(torch.cuda.get_arch_list()), unknown)
    for_nvidia = any(arch.startswith(("sm_", "compute_")) for arch in archs)
    has_code = covers(archs, capability) if capability is not None and for_nvidia else None
    profile = replace(profile, device_name=name, capability=capability, torch_archs=archs, torch_has_code=has_code)
    if not notes.attempt("a computation on the card", lambda: computes(torch, card), False):
        return profile
    free, total = notes.attempt("the card's memory", lambda: torch.cuda.mem_get_info(card), (0, 0))
    return replace(
        profile,
        device="cuda",
        vram_total=int(total),
        vram_free=int(free),
        native_bf16=torch.version.hip is not None or (capability is not None and capability >= FIRST_NATIVE_BF16),
        pin_limit=host.pinning_limit(profile.ram_total, profile.platform),
    )


def computes(torch: Any, card: int) -> bool:
    """Whether the card adds correctly; raises what CUDA raises, such as "no kernel image"."""
    return bool((torch.ones(1000, device=f"cuda:{card}").cumsum(0)[-1] == 1000).item())


def try_attention(device: str, dtype: str, every: bool = True) -> tuple[tuple[str, ...], dict[str, str]]:
    """(names of the backends that run, best first; the others that were tried with their reasons).

    every: else none is tried after the first that any weights may be computed with, nor those that are only asked for.
    """
    import torch

    from ..ops.attention.base import AttentionRequest
    from ..ops.attention.select import Trials, try_backend

    trials: Trials = {}
    request = AttentionRequest(torch.device(device), getattr(torch, dtype))
    best_first = [*preference(request.capability(), lossy=True), *(attention_backends().values() if every else ())]
    running: list[str] = []
    refused: dict[str, str] = {}
    for spec in dict.fromkeys(best_first):
        outcome = try_backend(spec, request, trials)
        if isinstance(outcome, str):
            refused[spec.name] = outcome
            continue
        running.append(spec.name)
        if not every and not spec.lossy:
            break
    return tuple(running), refused


def copy_speed(pinned: bool, free_bytes: int, card: int = 0) -> float:
    """GB/s of the best of five copies from RAM to the card, 256 MiB each where the card has room."""
    import torch

    size = max(1 << 20, min(256 << 20, free_bytes // 8))
    event: Callable[..., torch.cuda.Event] = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    best = float("inf")
    with torch.cuda.device(card):
        source = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
        target, stream = torch.empty_like(source, device=f"cuda:{card}"), torch.cuda.current_stream(card)
        for _ in range(6):
            start.record(stream)
            target.copy_(source, non_blocking=True)
            end.record(stream)
            end.synchronize()
            best = min(best, start.elapsed_time(end))
    return size / (best / 1000) / 1e9


def _package(notes: _Notes, module: str, distribution: str) -> Availability:
    """Whether an optional package is installed; it is not imported, that takes seconds."""
    problems = len(notes.problems)
    if not notes.attempt(distribution, lambda: _can_be_found(module), False):
        failed = notes.problems[problems:]
        return Availability(False, failed[0] if failed else f"not installed (pip install {distribution})")
    version = notes.attempt(distribution, lambda: importlib.metadata.version(distribution), "of unknown version")
    return Availability(True, version)


def _can_be_found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:  # not of a module itself, but of a package that it would be in
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        return False


def _tried(
    notes: _Notes, name: str, profile: HardwareProfile, card: int, why_not: Callable[[torch.device], str | None]
) -> Availability:
    if profile.device != "cuda":
        return Availability(False, "needs a CUDA GPU")

    def run() -> str | None:
        import torch

        return why_not(torch.device("cuda", card))

    problems = len(notes.problems)
    reason = notes.attempt(name, run, None)
    if len(notes.problems) > problems:
        return Availability(False, notes.problems[-1])
    return Availability(reason is None, "runs" if reason is None else reason)


def why_no_triton(device: torch.device) -> str | None:
    """None where a small Triton kernel compiles and gives the right answer on `device`, else why not."""
    from ..kernels.triton_language import MISSING

    missing = why_off("triton") or MISSING
    if missing is not None:
        return missing
    from .triton_trial import increments_correctly

    return None if increments_correctly(device) else "a Triton kernel gave a wrong result"


def why_no_nvrtc(device: torch.device) -> str | None:
    """None where CUDA C++ sources can be compiled for `device`, else why not."""
    from ..kernels.nvrtc import why_unavailable

    return why_unavailable(device)
