"""What `doctor` tells beside the hardware profile: our kernels, tried, and the backends that can run each format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..hardware.profile import Availability, HardwareProfile
from .probe import describe


@dataclass(frozen=True)
class Abilities:
    kernels: Mapping[str, Availability] = field(default_factory=dict)
    backends: Mapping[str, Mapping[str, Availability]] = field(default_factory=dict)
    """By format, then by the name that `backend=` takes, the preferred one first."""
    problems: tuple[str, ...] = ()
    """What could not be looked at, one line each."""


def abilities(profile: HardwareProfile) -> Abilities:
    """Tries every kernel of ours on the profile's device. Never raises, and compiles for seconds on a card."""
    problems: list[str] = []
    kernels: dict[str, Availability] = {}
    backends: dict[str, dict[str, Availability]] = {}
    if profile.torch_version is None:
        return Abilities()
    try:
        kernels = _kernels(profile)
    except Exception as failure:  # as in a probe, any failure is a finding
        problems.append(f"kernels: {describe(failure)}")
    try:
        backends = _backends(profile)
    except Exception as failure:
        problems.append(f"backends: {describe(failure)}")
    return Abilities(kernels, backends, tuple(problems))


def _kernels(profile: HardwareProfile) -> dict[str, Availability]:
    from ..kernels.trials import kernel_report
    from ..ops.device import indexed

    report = kernel_report(indexed(profile.device))
    return {status.name: Availability(status.reason is None, status.reason or "runs") for status in report}


def _backends(profile: HardwareProfile) -> dict[str, dict[str, Availability]]:
    from ..formats.registry import BACKENDS

    return {
        format: {name: _backend(format, name, profile) for name in names}
        for format, names in BACKENDS.items()
        if len(names) > 1
    }


def _backend(format: str, name: str, profile: HardwareProfile) -> Availability:
    package = profile.packages.get(name)
    if package is not None and not package.available:
        return package
    if profile.device != "cuda" and (name == "dfloat11" or (format, name) == ("dfloat11", "native")):
        return Availability(False, "needs a CUDA GPU")
    compiler = profile.packages.get("nvrtc")
    if (format, name) == ("dfloat11", "native") and compiler is not None and not compiler.available:
        return Availability(False, f"its kernel cannot be compiled: {compiler.reason}")
    return Availability(True, package.reason if package is not None else "runs")
