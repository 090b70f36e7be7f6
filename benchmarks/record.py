"""What every benchmark record carries beside its figures: the command that made it, hardware, versions and commit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowmem_bagel.errors import OutputError
from lowmem_bagel.hardware.features import VARIABLE, switched_off
from lowmem_bagel.hardware.host import cores, processor

from .rows import Row

Record = dict[str, Any]

PACKAGES = ("torch", "triton", "bitsandbytes", "optimum-quanto", "dfloat11", "accelerate", "numba", "lowmem-bagel")


def write_record(path: Path, benchmark: str, settings: Mapping[str, Any], results: object) -> None:
    """Write one record; the folder must exist.

    Raises:
        OutputError: it cannot be written.
    """
    save(path, {"benchmark": benchmark, "command": command(), **environment(), "settings": dict(settings)}, results)


def save(path: Path, head: Mapping[str, Any], results: object) -> None:
    """Write a record of a known head, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps({**head, "results": results}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror}); choose another place with --out") from error


def read_records(folder: Path) -> dict[str, Any]:
    """Every record of a folder by its file's name, and the text of what other programs printed.

    Rows of `bench engine` by backends that are not known any more are left out.
    """
    found: dict[str, Any] = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}
    for path in folder.glob("*.json"):
        found[path.stem] = record = json.loads(path.read_text(encoding="utf-8"))
        if record["benchmark"] == "engine":
            record["results"] = [figures for figures in record["results"] if Row.parse(figures["row"]).is_known]
    return found


def command() -> str:
    """What this process was started by, so that a record says how to make it again."""
    module = sys.modules["__main__"].__spec__
    program = ["lowmem-bagel"] if module is None or sys.argv[1:2] == ["bench"] else ["python", "-m", module.name]
    off = f"{VARIABLE}={','.join(switched_off())} " if switched_off() else ""
    return off + shlex.join([*program, *sys.argv[1:]])


def environment() -> Record:
    """The machine, as far as it matters to a figure."""
    import torch

    hardware: Record = {"cpu": processor()[0], "cores": cores(), "system": platform.platform()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        hardware |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_bytes": properties.total_memory,
        }
    off = {"switched_off": list(switched_off())} if switched_off() else {}
    return {"hardware": hardware, "versions": _versions(), "commit": _commit(), **off}


def commits(report: str, rows: Iterable[str]) -> str:
    """A report's commit and those of rows that are of another, empty for the others: "a, 2 rows of b"."""
    counts = Counter(filter(None, rows))
    more = (f"{count} {'row' if count == 1 else 'rows'} of {commit}" for commit, count in counts.items())
    return ", ".join((report, *more))


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
