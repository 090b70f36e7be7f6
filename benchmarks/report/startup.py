"""From the command to the first step and to the picture, in fresh processes: what `bench startup` measures."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lowmem_bagel.errors import SettingError, first_line

COMMAND = (sys.executable, "-c", "from lowmem_bagel.cli import main; main()")
REQUEST = ("generate", "a red circle", "--seed", "0", "--json")
READERS = 8
PIECE = 8 << 20
SAMPLED = 64
"""Places of a file that are asked for to see whether the page cache still has it."""
SECONDS = 900.0


WHOLE = "whole"
"""Beside the phases of a command, their sum."""


def measure_startup(folder: Path, flags: Sequence[str] = (), repeat: int = 2) -> dict[str, Any]:
    """One cold start of a folder and `repeat` warm ones, whose medians count.

    Cold: the page cache gave up the folder's files and no cache of ours, Triton's or CUDA's is there. `flags` go to
    `generate`. Bytes a second beside the loader's are those of plain reads by as many threads just before.

    Raises:
        SettingError: the command fails; the message is its last line.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".gguf")]
    with tempfile.TemporaryDirectory() as own:
        drop(files)
        cold_disk = read_speed(files)
        drop(files)
        kept = cached_share(files)
        cold = started(folder, flags, Path(own))
        warm_disk = read_speed(files)
        warm = [started(folder, flags, Path(own)) for _ in range(repeat)]
    return {
        "stored_bytes": sum(path.stat().st_size for path in files),
        "cold": cold["phases"],
        "warm": _medians([run["phases"] for run in warm]),
        "cold_first_step": cold["first step"],
        "warm_first_step": statistics.median(run["first step"] for run in warm),
        "read_bytes": cold["read_bytes"],
        "bytes_per_second": {"cold": cold_disk, "warm": warm_disk},
        "not_dropped": f"{kept:.0%} of the files stayed in the page cache" if kept > 0.01 else None,
        "runs": [cold, *warm],
    }


def started(folder: Path, flags: Sequence[str], caches: Path) -> dict[str, Any]:
    """One run of the command: seconds by phase, which add up to those of the process, and until the first step."""
    out = caches / "picture.png"
    command = [*COMMAND, *REQUEST, "--model", str(folder.resolve()), "--out", str(out), *flags]
    begun, start = time.time(), time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env=_with_caches(os.environ, caches)
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise SettingError(f"the command failed: {first_line(RuntimeError(done.stderr.strip().splitlines()[-1]))}")
    told = json.loads(done.stdout)
    startup = told["startup"]
    before = startup["began"] - begun
    phases = {"interpreter and command line": before, **startup["phases"]}
    phases |= {name: phase["seconds"] for name, phase in told["stats"].items()}
    phases["end of the process"] = seconds - before - startup["reached"]["picture"]
    return {
        "phases": {**phases, "other": max(0.0, seconds - sum(phases.values())), WHOLE: seconds},
        "first step": before + startup["reached"]["first step"],
        "read_bytes": startup["read_bytes"],
    }


def drop(files: Sequence[Path]) -> None:
    """Have the page cache give files up, where the system can be asked to."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(files: Sequence[Path]) -> float:
    """How much of the files the page cache has, by samples; 1 where the system does not tell."""
    return statistics.mean(found) if (found := [hit for path in files for hit in _cached(path)]) else 1.0


def _cached(path: Path) -> Iterator[bool]:
    if not hasattr(os, "RWF_NOWAIT"):
        yield True
        return
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for index in range(SAMPLED):
            try:
                yield os.preadv(file.fileno(), [bytearray(1)], size * index // SAMPLED, os.RWF_NOWAIT) == 1
            except BlockingIOError:
                yield False
            except OSError:  # the file system does not tell
                yield True


def read_speed(files: Sequence[Path], threads: int = READERS) -> float:
    """Bytes a second of plain reads by several threads, each of a stretch at a time; nothing is kept."""
    stretch = 64 << 20
    places = [(path, at) for path in files for at in range(0, path.stat().st_size, stretch)]

    def read(place: tuple[Path, int]) -> int:
        path, at = place
        buffer, done = bytearray(PIECE), 0
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            while done < stretch and (count := file.readinto(buffer)):
                done += count
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        nbytes = sum(pool.map(read, places))
    return nbytes / (time.perf_counter() - start)


def lines(name: str, measured: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, for people."""
    for state in ("cold", "warm"):
        phases = measured[state]
        speed = measured["bytes_per_second"][state] / 1e9
        read = measured["read_bytes"] / 1e9
        yield (
            f"{name}, {state}: {measured[f'{state}_first_step']:.1f} s to the first step, {phases[WHOLE]:.1f} s in "
            f"all; weights {read:.2f} GB in {phases['weights']:.2f} s, plain reads {speed:.2f} GB/s"
        )
        yield "  " + ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in phases.items() if phase != WHOLE)
    if measured["not_dropped"] is not None:
        yield f"  not quite cold: {measured['not_dropped']}"


def _with_caches(environment: Mapping[str, str], caches: Path) -> dict[str, str]:
    """Every cache in one folder of its own."""
    own = {"XDG_CACHE_HOME": "", "LOCALAPPDATA": "", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda"}
    return {**environment, **{name: str(caches / place) for name, place in own.items()}}


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row.get(name, 0.0) for row in rows) for name in rows[0]}
