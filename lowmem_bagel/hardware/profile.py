"""What a machine can do, as data: probed (`diagnostics.probe`), read back from JSON, or made up for a card not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from ..errors import ConfigError
from . import host
from .features import VARIABLE, switched_off

GIB = 1 << 30
FIRST_NATIVE_BF16 = (8, 0)
CONTEXT_BYTES = 820_000_000
"""A process's CUDA context with the libraries' handles and loaded kernels: what the H200 had in use beyond torch's
reserved memory, 0.74 to 0.86 GB while drawing (engine_h200.json)."""
PAGEABLE_GBPS = 6.1
"""Copies from pageable memory measured on the H200 machine; assumed for machines that are not here."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


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
    """Backends that gave right answers here in `attention_dtype`, best first; empty where none was tried."""
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
    """What this machine may have and is not to use; see `features`."""
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
