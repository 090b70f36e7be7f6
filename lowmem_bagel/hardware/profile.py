"""What this machine can do: probed into a frozen profile, read back from JSON, or made up for a card not here.

The profile itself needs no torch; `probe` imports it inside. Kernels are chosen by capability and trial, so nothing
here decides by a card's name.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ..errors import ConfigError
from . import host
from .features import VARIABLE, switched_off, why_off
from .torch_builds import covers

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

GIB = 1 << 30
FIRST_NATIVE_BF16 = (8, 0)
PAGEABLE_GBPS = 6.1
"""Copies from pageable memory measured on the H200 machine; assumed for machines that are not here."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "dfloat11": ("dfloat11", "dfloat11"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "flash-attn": ("flash_attn", "flash-attn"),
}
"""Our name of an optional package: its module and its name on the package index."""


@dataclass(frozen=True)
class Availability:
    available: bool
    reason: str
    """The version or what was tried where available; why not otherwise."""


@dataclass(frozen=True)
class HardwareProfile:
    """Memory in bytes, speeds in 1e9 bytes a second; None where a speed was not measured."""

    device: Literal["cuda", "cpu"] = "cpu"
    device_name: str = ""
    capability: tuple[int, int] | None = None
    """Compute capability of the card; None without one."""
    vram_total: int = 0
    vram_free: int = 0
    native_bf16: bool = False
    """bfloat16 arithmetic without emulation: the card's, or the processor's where there is no card."""
    attention: tuple[str, ...] = ()
    """Backends that gave right answers here in `attention_dtype`, best first."""
    attention_refused: Mapping[str, str] = field(default_factory=dict)
    attention_dtype: str = "float32"
    pinned_gbps: float | None = None
    pageable_gbps: float | None = None
    disk_gbps: float | None = None
    platform: host.Platform = "linux"
    ram_total: int = 0
    ram_available: int = 0
    pin_limit: int = 0
    """Bytes of RAM that can be page-locked at most."""
    cpu_name: str = ""
    cpu_features: tuple[str, ...] = ()
    cores: int = 1
    torch_version: str | None = None
    torch_cuda: str | None = None
    """The CUDA version torch was built with; None for a CPU build."""
    torch_archs: tuple[str, ...] = ()
    torch_has_code: bool | None = None
    """Whether this torch has code for the card; None without a card, or where it cannot be told."""
    packages: Mapping[str, Availability] = field(default_factory=dict)
    driver_cards: tuple[host.DriverCard, ...] = ()
    """What nvidia-smi lists, whether or not torch can use it."""
    problems: tuple[str, ...] = ()
    """Probes that failed, one line each."""
    switched_off: tuple[str, ...] = ()
    """What this machine may have and is not to use; see `switches`."""
    assumed: bool = False
    """True for a machine that is not here."""

    @classmethod
    def hypothetical(
        cls,
        vram_gb: float,
        compute_capability: tuple[int, int] | None,
        ram_gb: float,
        pcie_gbps: float,
        *,
        name: str = "",
        kind: host.Platform = "linux",
    ) -> HardwareProfile:
        """A machine that is not here, all its memory free; GB are 2**30 bytes, `pcie_gbps` is the pinned copy speed.

        `compute_capability` None means no usable card.
        """
        ram = int(ram_gb * GIB)
        without_card = cls(
            platform=kind,
            ram_total=ram,
            ram_available=ram,
            attention=("sdpa", "chunked", "math"),
            cores=8,
            assumed=True,
        )
        if compute_capability is None:
            return without_card
        vram = int(vram_gb * GIB)
        bf16 = compute_capability >= FIRST_NATIVE_BF16
        return replace(
            without_card,
            device="cuda",
            device_name=name,
            capability=compute_capability,
            vram_total=vram,
            vram_free=vram,
            native_bf16=bf16,
            attention=_attention_by_capability(compute_capability),
            attention_dtype="bfloat16" if bf16 else "float16",
            pinned_gbps=pcie_gbps,
            pageable_gbps=min(PAGEABLE_GBPS, pcie_gbps),
            pin_limit=host.pinning_limit(ram, kind),
            torch_has_code=True,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON values only; `from_json` gives an equal profile back."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HardwareProfile:
        """The profile that `to_json` wrote; keys of a newer version are an error, missing ones get the default.

        Raises:
            ConfigError: an unknown key or a value of the wrong form.
        """
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ConfigError(
                f"hardware profile: unknown {', '.join(sorted(unknown))}; write it anew with doctor --json"
            )
        known = dict(values)
        try:
            for key in ("attention", "cpu_features", "torch_archs", "problems", "switched_off"):
                known[key] = tuple(str(item) for item in known.get(key, ()))
            known["capability"] = _capability(known.get("capability"))
            known["packages"] = {name: Availability(**value) for name, value in known.get("packages", {}).items()}
            known["driver_cards"] = tuple(
                host.DriverCard(**{**card, "capability": _capability(card["capability"])})
                for card in known.get("driver_cards", ())
            )
            return cls(**known)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"hardware profile: {error}; write it anew with doctor --json") from error


def _capability(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, str):
        raise ValueError(f"a compute capability is two numbers, not {value!r}")
    major, minor = value
    return int(major), int(minor)


def _attention_by_capability(capability: tuple[int, int]) -> tuple[str, ...]:
    """What PyTorch's own kernels can be expected to do on a card that cannot be tried."""
    if capability < FIRST_NATIVE_BF16:
        return "efficient", "chunked", "math"
    return "cudnn", "flash", "efficient", "chunked", "math"


def probe(measure: bool = True, disk_path: Path | None = None) -> HardwareProfile:
    """This machine. Never raises: what cannot be found out keeps its default and is named in `problems`.

    `measure` also times copies to the card and, where `disk_path` is given, reading from it: about two seconds.
    """
    notes = _Notes()
    profile = _probe_host(notes)
    torch_module = notes.attempt("torch", lambda: importlib.import_module("torch"), None)
    if torch_module is not None:
        profile = _probe_torch(notes, profile, torch_module)
        if profile.device == "cuda" and measure:
            profile = replace(
                profile,
                pinned_gbps=notes.attempt("pinned copy speed", lambda: copy_speed(True, profile.vram_free), None),
                pageable_gbps=notes.attempt("pageable copy speed", lambda: copy_speed(False, profile.vram_free), None),
            )
    if measure and disk_path is not None:
        speed = notes.attempt("disk speed", lambda: host.disk_read_speed(disk_path), None)
        profile = replace(profile, disk_gbps=speed)
    packages = {name: _package(notes, *where) for name, where in PACKAGES.items()}
    packages |= {
        "triton": _tried(notes, "triton", profile, why_no_triton),
        "nvrtc": _tried(notes, "nvrtc", profile, why_no_nvrtc),
    }
    return as_switched(replace(profile, packages=packages, problems=tuple(notes.problems)))


def as_switched(profile: HardwareProfile) -> HardwareProfile:
    """The profile without what is switched off by hand."""
    off = switched_off()
    reason = f"switched off by {VARIABLE}"
    return replace(
        profile,
        switched_off=off,
        native_bf16=profile.native_bf16 and "bf16" not in off,
        attention=tuple(name for name in profile.attention if name not in off),
        pin_limit=0 if "pinning" in off else profile.pin_limit,
        packages={
            name: Availability(False, reason) if name in off else found for name, found in profile.packages.items()
        },
    )


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
        driver_cards=tuple(notes.attempt("nvidia-smi", host.driver_cards, [])),
    )


def _probe_torch(notes: _Notes, profile: HardwareProfile, torch: Any) -> HardwareProfile:
    profile = replace(
        profile,
        torch_version=notes.attempt("torch's version", lambda: str(torch.__version__), None),
        torch_cuda=notes.attempt("torch's CUDA version", lambda: torch.version.cuda, None),
    )
    if notes.attempt("CUDA", lambda: bool(torch.cuda.is_available()), False):
        profile = _probe_card(notes, profile, torch)
    elif VISIBLE in os.environ:
        notes.problems.append(f"{VISIBLE}={os.environ[VISIBLE]} decides which cards PyTorch sees")
    profile = as_switched(profile)
    dtype = "bfloat16" if profile.native_bf16 else "float16" if profile.device == "cuda" else "float32"
    nothing: tuple[tuple[str, ...], dict[str, str]] = ((), {})
    running, refused = notes.attempt("attention", lambda: try_attention(profile.device, dtype), nothing)
    return replace(profile, attention=running, attention_refused=refused, attention_dtype=dtype)


def _probe_card(notes: _Notes, profile: HardwareProfile, torch: Any) -> HardwareProfile:
    """Adds the first card, as the device only if a computation on it comes out right."""
    name = notes.attempt("card's name", lambda: str(torch.cuda.get_device_name(0)), "")
    capability = notes.attempt("compute capability", lambda: _capability(torch.cuda.get_device_capability(0)), None)
    unknown: tuple[str, ...] = ()
    archs = notes.attempt("torch's architectures", lambda: tuple(torch.cuda.get_arch_list()), unknown)
    for_nvidia = any(arch.startswith(("sm_", "compute_")) for arch in archs)
    has_code = covers(archs, capability) if capability is not None and for_nvidia else None
    profile = replace(profile, device_name=name, capability=capability, torch_archs=archs, torch_has_code=has_code)
    if not notes.attempt("a computation on the card", lambda: computes(torch), False):
        return profile
    free, total = notes.attempt("the card's memory", lambda: torch.cuda.mem_get_info(0), (0, 0))
    bf16 = notes.attempt("bfloat16", lambda: bool(torch.cuda.is_bf16_supported(including_emulation=False)), False)
    return replace(
        profile,
        device="cuda",
        vram_total=int(total),
        vram_free=int(free),
        native_bf16=bf16,
        pin_limit=host.pinning_limit(profile.ram_total, profile.platform),
    )


def computes(torch: Any) -> bool:
    """Whether the card adds correctly; raises what CUDA raises, such as "no kernel image"."""
    return bool((torch.ones(1000, device="cuda").cumsum(0)[-1] == 1000).item())


def try_attention(device: str, dtype: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """(names of the backends that run, best first; the others with their reasons)."""
    import torch

    from ..ops.attention.select import FACTORIES, Request, preference, try_backend

    request = Request(torch.device(device), getattr(torch, dtype))
    best_first = [*preference(request), *FACTORIES]
    outcomes = {name: try_backend(name, request) for name in dict.fromkeys(best_first)}
    running = tuple(name for name, outcome in outcomes.items() if not isinstance(outcome, str))
    return running, {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, str)}


def copy_speed(pinned: bool, free_bytes: int) -> float:
    """GB/s of the best of five copies from RAM to the card, 256 MiB each where the card has room."""
    import torch

    size = max(1 << 20, min(256 << 20, free_bytes // 8))
    source = torch.zeros(size, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty_like(source, device="cuda")
    event: Callable[..., torch.cuda.Event] = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    best = float("inf")
    for _ in range(6):
        start.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end))
    return size / (best / 1000) / 1e9


def _package(notes: _Notes, module: str, distribution: str) -> Availability:
    """Whether an optional package is installed; it is not imported, that takes seconds."""
    problems = len(notes.problems)
    if notes.attempt(distribution, lambda: importlib.util.find_spec(module), None) is None:
        failed = notes.problems[problems:]
        return Availability(False, failed[0] if failed else f"not installed (pip install {distribution})")
    version = notes.attempt(distribution, lambda: importlib.metadata.version(distribution), "of unknown version")
    return Availability(True, version)


def _tried(
    notes: _Notes, name: str, profile: HardwareProfile, why_not: Callable[[torch.device], str | None]
) -> Availability:
    if profile.device != "cuda":
        return Availability(False, "needs a CUDA GPU")

    def run() -> str | None:
        import torch

        return why_not(torch.device("cuda"))

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
    from ..diagnostics.triton_trial import increments_correctly

    return None if increments_correctly(device) else "a Triton kernel gave a wrong result"


def why_no_nvrtc(device: torch.device) -> str | None:
    """None where CUDA C++ sources can be compiled for `device`, else why not."""
    from ..kernels.nvrtc import why_unavailable

    return why_unavailable(device)
