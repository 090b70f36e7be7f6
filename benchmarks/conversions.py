"""The conversions that are measured, by what a record calls them, the installed converter that makes them, and what
bounds them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from lowmem_bagel.checkpoint.manifest import Manifest
from lowmem_bagel.errors import SettingError

from .synthetic import WEIGHT_STD

if TYPE_CHECKING:
    from torch import Tensor

DISK_COPIES = 8
READ_BYTES = 8 << 20

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("bf16", {}),
    "dfloat11": ("dfloat11", {}),
    "int8": ("int8", {}),
    "int8 with embeddings": ("int8", {"embeddings": True}),
    "int8 rotated": ("int8", {"rotate": True}),
    "fp16": ("fp16", {}),
    "nf4": ("nf4", {}),
    "gguf-q8_0": ("gguf-q8_0", {}),
    "gguf-q6_k": ("gguf-q6_k", {}),
    "gguf-q5_k": ("gguf-q5_k", {}),
    "gguf-q4_k": ("gguf-q4_k", {}),
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


class Phases:
    """Seconds by stage, added up from several threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lock = Lock()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add what the block takes to a stage."""
        begun = time.perf_counter()
        yield
        with self._lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun


def convert(source: str | Path, out: str | Path, case: str, **settings: Any) -> Manifest:
    """Convert a checkpoint as the case says."""
    (tool,) = entry_points(group="lowmem_bagel.tools", name="convert")
    manifest: Manifest = tool.load()(Path(source), Path(out), *CASES[case], **settings)
    return manifest


def timed(source: str, out: str, case: str) -> None:
    """Convert, and print the seconds of the stages as JSON."""
    phases = Phases()
    convert(source, out, case, phases=phases)
    print(json.dumps({name: round(seconds, 2) for name, seconds in phases.seconds.items()}))


def bounds(folder: Path, shape: tuple[int, int], repeats: int = 5) -> dict[str, float]:
    """What single stages reach alone on this machine, the best of some runs, in MB/s: of one core's hashing, of the
    disk's writing with its sync and reading, and of encoding a weight of this shape on all cores, in source bytes."""
    import torch

    from .timing import elapsed_seconds

    data = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(WEIGHT_STD).bfloat16()
    raw = data.view(torch.uint8).numpy().tobytes()
    stages: dict[str, Callable[[], object]] = {
        "sha256": lambda: hashlib.sha256(raw).digest(),
        "write": lambda: _write(folder / "bound", raw),
        "read": lambda: _read(folder / "bound", len(raw)),
        **{format: partial(encode, data) for format, encode in _encoders().items()},
    }
    found: dict[str, float] = {}
    for name, stage in stages.items():
        stage()
        found[name] = round(
            len(raw)
            * (DISK_COPIES if name in ("write", "read") else 1)
            / min(elapsed_seconds(stage) for _ in range(repeats))
            / 1e6
        )
    (folder / "bound").unlink()
    return found


def _encoders() -> dict[str, Callable[[Tensor], object]]:
    from lowmem_bagel.formats.dfloat11 import codec as dfloat11
    from lowmem_bagel.formats.fp16 import codec as fp16
    from lowmem_bagel.formats.int8 import codec as int8
    from lowmem_bagel.formats.nf4 import codec as nf4

    def checked(weight: Tensor) -> None:
        assert dfloat11.matches(dfloat11.encode([weight]), [weight])

    return {"dfloat11": checked, "int8": int8.encode, "fp16": fp16.convert, "nf4": nf4.encode}


def _write(path: Path, raw: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(DISK_COPIES):
            file.write(raw)
        os.fsync(file.fileno())


def _read(path: Path, nbytes: int) -> None:
    """From the disk, not from the page cache."""
    room = bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while file.readinto(room):
            pass
