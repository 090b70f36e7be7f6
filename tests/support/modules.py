"""The modules of the distribution."""

from __future__ import annotations

from pathlib import Path

from support.paths import ROOT

FOLDERS = {
    "lowmem_bagel": ROOT / "lowmem_bagel",
    "lowmem_bagel.converters": ROOT / "converters",
    "lowmem_bagel.benchmarks": ROOT / "benchmarks",
}


def find_modules() -> dict[str, Path]:
    """Every module of the distribution by its installed name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            if package == "lowmem_bagel" and path.is_relative_to(folder / "converters"):
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = find_modules()
