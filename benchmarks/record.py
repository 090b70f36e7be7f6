"""What every benchmark record carries beside its figures: hardware, versions, commit and settings."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_bagel.hardware.features import switched_off

PACKAGES = ("torch", "triton", "bitsandbytes", "optimum-quanto", "dfloat11", "accelerate", "numba", "lowmem-bagel")


def environment() -> dict[str, Any]:
    """The machine, as far as it matters to a figure."""
    import torch

    hardware: dict[str, Any] = {"cpu": _cpu_name(), "cores": _cores(), "system": platform.platform()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        hardware |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_bytes": properties.total_memory,
        }
    off = {"switched_off": list(switched_off())} if switched_off() else {}
    return {"hardware": hardware, "versions": _versions(), "commit": _commit(), **off}


def write_record(path: Path, benchmark: str, settings: Mapping[str, Any], results: object) -> None:
    """Write one record; the folder must exist."""
    record = {"benchmark": benchmark, **environment(), "settings": dict(settings), "results": results}
    path.write_text(json.dumps(record, indent=1) + "\n")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    """The checkout's commit, `+` behind it where files differ; outside a checkout what LOWMEM_BAGEL_COMMIT says."""
    import os

    if "LOWMEM_BAGEL_COMMIT" in os.environ:
        return os.environ["LOWMEM_BAGEL_COMMIT"]

    def git(*arguments: str) -> str:
        here = Path(__file__).resolve().parent
        return subprocess.run(
            ["git", "-C", here, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
