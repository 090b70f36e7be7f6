"""Parts of a report that are benchmarks of their own: run as the commands that they are, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_bagel.errors import printable
from lowmem_bagel.files import parse_json, read_file

if TYPE_CHECKING:
    from .store import Store
    from .subject import Subject


def fidelity_options(
    of: Subject, conditions: Mapping[str, Any], device: str, quick: bool, material: Path | None
) -> list[str]:
    """Of `bench fidelity`: every variant of the report against the source."""
    variants = [str(of.folders.get(name, name)) for name in of.formats if name != "source"]
    options = [*_subject(of), "--variants", ",".join(variants), "--device", device, "--size", str(conditions["size"])]
    options += ["--num-timesteps", str(conditions["num_timesteps"])]
    options += ["--material", str(material)] if material else []
    return options + (["--quick"] if quick else [])


def startup_options(of: Subject, conditions: Mapping[str, Any]) -> list[str]:
    """Of `bench startup`: every variant of the report."""
    drawn = ["--size", str(conditions["size"]), "--timesteps", str(conditions["num_timesteps"])]
    if of.shape:
        return ["--shape", of.shape, "--formats", ",".join(of.formats), *drawn]
    return [*(str(of.folders[name]) for name in of.formats), *drawn]


def add_part(name: str, options: Sequence[str], store: Store, of: Subject) -> None:
    """Measure a part that the record lacks, and add it. What fails is said in a line, and the record has none of it."""
    if store.results[name] is not None or name not in {p.name for p in entry_points(group="lowmem_bagel.benchmarks")}:
        return
    out = store.path.parent / f"{name}.json"
    words = ["-m", "lowmem_bagel.benchmarks", name, *options, "--out", str(out)]
    ran = subprocess.run([sys.executable, *words], stderr=subprocess.PIPE, text=True)
    if ran.returncode:
        said = [line for line in ran.stderr.splitlines() if line.strip()]
        print(f"no {name}: {printable(said[-1] if said else f'code {ran.returncode}', 400)}", flush=True)
        return
    found = parse_json(read_file(out))["results"]
    store.results[name] = _named(found, of) if name == "fidelity" else found
    store.write()


def _named(fidelity: dict[str, Any], of: Subject) -> dict[str, Any]:
    """With a folder's variants called as their rows are."""
    names = {str(path): name for name, path in of.folders.items()}
    variants = [{**variant, "name": names.get(variant["name"], variant["name"])} for variant in fidelity["variants"]]
    return {**fidelity, "variants": variants}


def _subject(of: Subject) -> list[str]:
    return ["--shape", of.shape] if of.shape else [str(of.folders["source"])] if "source" in of.folders else []
