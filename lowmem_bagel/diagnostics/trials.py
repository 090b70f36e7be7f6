"""What `doctor` tells beside the hardware profile: our kernels, tried, and the backends that can run each format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..formats.registry import formats
from ..formats.spec import TENSOR_CORES, Environment, FormatSpec
from ..hardware.profile import Availability, HardwareProfile
from .probe import describe

if TYPE_CHECKING:
    import torch

    from ..kernels.trials import Kernel


@dataclass(frozen=True)
class Findings:
    kernels: Mapping[str, Availability] = field(default_factory=dict)
    backends: Mapping[str, Mapping[str, Availability]] = field(default_factory=dict)
    """By format, then by the name that `backend=` takes, the preferred one first."""
    tuned: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """By format: what was measured on this card before, in lines by their names."""
    problems: tuple[str, ...] = ()
    """What could not be looked at, one line each."""


def try_all(profile: HardwareProfile) -> Findings:
    """Tries every kernel of ours on the profile's device. Never raises, and compiles for seconds on a card."""
    problems: list[str] = []
    kernels: dict[str, Availability] = {}
    backends: dict[str, dict[str, Availability]] = {}
    tuned: dict[str, dict[str, str]] = {}
    if profile.torch_version is None:
        return Findings()
    try:
        kernels = _kernels(profile)
    except Exception as failure:  # as in a probe, any failure is a finding
        problems.append(f"kernels: {describe(failure)}")
    try:
        backends = _backends(profile)
    except Exception as failure:
        problems.append(f"backends: {describe(failure)}")
    try:
        tuned = _tuned(profile)
    except Exception as failure:
        problems.append(f"what was measured before: {describe(failure)}")
    return Findings(kernels, backends, tuned, tuple(problems))


def _kernels(profile: HardwareProfile) -> dict[str, Availability]:
    from ..ops.device import indexed

    report = kernel_report(indexed(profile.device))
    return {name: Availability(reason is None, reason or "runs") for name, reason in report.items()}


def kernel_report(device: torch.device) -> dict[str, str | None]:
    """Every kernel by name, and why it is not used on `device` (None: it is) by the published model: Triton's, then
    those that serve where it does not."""
    import torch

    from ..checkpoint.config import BAGEL_7B
    from ..kernels.cuda_source import CudaSource
    from ..kernels.trial_inputs import Sizes
    from ..kernels.trials import choose_attend_token, choose_elementwise, why_not

    modern = device.type == "cuda" and torch.cuda.get_device_capability(device) >= TENSOR_CORES
    source = CudaSource(device, torch.bfloat16 if modern else torch.float16)
    sizes = Sizes(BAGEL_7B.decoder, torch.bfloat16)
    found = {name: why_not(kernel, device, sizes, again=True) for name, kernel in triton_kernels().items()}
    found["elementwise"] = choose_elementwise(source)[1]
    found["attend_token"] = choose_attend_token(source)[1]
    compiled = {name: trial for name, trial in _trials_of_formats().items() if name not in found}
    return found | {name: trial(source) for name, trial in compiled.items()}


def triton_kernels() -> dict[str, Kernel]:
    """Every Triton kernel by name, those of formats last."""
    from ..kernels.trials import KERNELS, Kernel

    return dict(KERNELS) | {n: trial for n, trial in _trials_of_formats().items() if isinstance(trial, Kernel)}


def _trials_of_formats() -> dict[str, Any]:
    return {name: _named(path) for spec in formats().values() for name, path in spec.trials.items()}


def _named(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def _tuned(profile: HardwareProfile) -> dict[str, dict[str, str]]:
    from ..ops.device import indexed

    device = indexed(profile.device)
    return {spec.name: _named(spec.tuned)(device) for spec in formats().values() if spec.tuned}


def _backends(profile: HardwareProfile) -> dict[str, dict[str, Availability]]:
    return {
        spec.name: {name: _backend(spec, name, profile) for name in spec.backends}
        for spec in formats().values()
        if len(spec.backends) > 1
    }


def _backend(spec: FormatSpec, name: str, profile: HardwareProfile) -> Availability:
    package = profile.packages.get(name)
    if package is not None and not package.available:
        return package
    missing = {feature: found.reason for feature, found in profile.packages.items() if not found.available}
    here = Environment(profile.device, "bfloat16", profile.capability or (0, 0), missing)
    refused = [way.requires.unmet(here) for way in spec.ways_by(name)]
    if all(refused):
        return Availability(False, str(refused[0]))
    return Availability(True, package.reason if package is not None else "runs")
