"""The conversions that are measured, by what a record calls them, and the installed converter that makes them."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lowmem_bagel.checkpoint.manifest import Manifest
from lowmem_bagel.errors import SettingError

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "dfloat11": ("dfloat11", {}),
    "int8": ("int8", {}),
    "int8 with embeddings": ("int8", {"embeddings": True}),
    "int8 rotated": ("int8", {"rotate": True}),
    "fp16": ("fp16", {}),
    "nf4": ("nf4", {}),
}


def chosen(text: str) -> list[str]:
    """The cases of an option's value, commas between them.

    Raises:
        SettingError: an unknown case.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in CASES]:
        raise SettingError(f"unknown {', '.join(unknown)}; choose from {', '.join(CASES)}")
    return names


def convert(source: str | Path, out: str | Path, case: str) -> Manifest:
    """Convert a checkpoint as the case says."""
    (tool,) = entry_points(group="lowmem_bagel.tools", name="convert")
    manifest: Manifest = tool.load()(Path(source), Path(out), *CASES[case])
    return manifest
