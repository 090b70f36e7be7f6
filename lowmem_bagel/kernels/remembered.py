"""Trials that passed on this machine before, so that a load need not repeat them: seconds of launches and comparisons.

What passed holds for the same card, driver, PyTorch, Triton and sources of ours, to the byte. Failures are not kept:
each load tries again, and says what it found. `doctor` always tries.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..hardware.host import driver_version
from ..hardware.user_cache import cache_folder, keep, kept
from .triton_language import VERSION

SOURCES = ("kernels", "formats", "ops")
"""Folders of the package with kernels, their references and their trials."""


@dataclass(frozen=True)
class Passed:
    """The file of what passed. `key`: what it holds for."""

    path: Path
    key: Mapping[str, str]

    def has(self, trial: str) -> bool:
        """Whether it passed; no where the file is missing, damaged or of something else."""
        return trial in self._trials()

    def add(self, trial: str) -> None:
        """Keep that it passed, where the folder can be written: it is tried again elsewhere."""
        try:
            keep(self.path, {"for": dict(self.key), "passed": sorted({*self._trials(), trial})})
        except OSError:
            return

    def _trials(self) -> list[str]:
        value = kept(self.path)
        if not isinstance(value, dict) or value.get("for") != dict(self.key):
            return []
        found = value.get("passed")
        return [trial for trial in found if isinstance(trial, str)] if isinstance(found, list) else []


def passed_on(device: torch.device) -> Passed | None:
    """What passed on a card; None where the driver does not tell its version, or the user has no home."""
    properties, driver = torch.cuda.get_device_properties(device), driver_version()
    if driver == "unknown":
        return None
    key = {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "driver": driver,
        "torch": str(torch.__version__),
        "triton": VERSION,
        "settings": _settings(os.environ),
        "sources": sources_hash(),
    }
    try:
        folder = cache_folder()
    except OSError:
        return None
    return Passed(folder / f"trials_{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json", key)


def name_of(trial: Callable[..., Any], sizes: object) -> str:
    """A trial for a decoder of these sizes, the same in every process."""
    own = trial.func if isinstance(trial, partial) else trial
    given = trial.args if isinstance(trial, partial) else ()
    return f"{own.__module__}.{own.__qualname__}{given} for {sizes}"


def _settings(environment: Mapping[str, str]) -> str:
    """What is set of Triton's own variables, which change how it compiles; where its cache is does not."""
    names = sorted(name for name in environment if name.startswith("TRITON_") and name != "TRITON_CACHE_DIR")
    return " ".join(f"{name}={environment[name]}" for name in names)


def sources_hash() -> str:
    """Of all files that kernels, their references and their trials are made of."""
    digest, package = hashlib.sha256(), resources.files(__package__.partition(".")[0])
    for folder in SOURCES:
        root = Path(str(package.joinpath(folder)))
        for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cu", ".cuh", ".h")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
