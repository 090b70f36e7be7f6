"""Libraries that g++ makes of an emulated kernel's source, kept beside pytest's own cache: for other workers, and until
the source, the emulation, the options or the compiler are others. Compiling is most of what their tests take."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock

from support.paths import ROOT

KEPT = ROOT / ".pytest_cache" / "emulations"
UNUSED_SECONDS = 30 * 86400
"""After which a library is removed."""


def compiler() -> str | None:
    return shutil.which("g++")


def compile_with(options: Sequence[str], folder: Path) -> None:
    path = compiler()
    assert path is not None
    done = subprocess.run([path, *options], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def library(unit: str, header: Path, options: Sequence[str], included: Callable[[], Path]) -> ctypes.CDLL:
    """The unit compiled with these options. `included` gives the folder where it finds the header, if it is needed."""
    file = KEPT / f"{_name(unit, header.read_text(), *options)}.so"
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            _remove_unused()
            with tempfile.TemporaryDirectory(prefix="emulation-") as name:
                folder = Path(name)
                (folder / "unit.cpp").write_text(unit)
                compile_with([*options, f"-I{included()}", "-o", "unit.so", "unit.cpp"], folder)
                whole = Path(shutil.copy(folder / "unit.so", file.with_suffix(".new")))
            whole.replace(file)
    os.utime(file)
    return ctypes.CDLL(str(file))


def _name(*given: str) -> str:
    """A hash of what decides what comes out."""
    path = os.path.realpath(compiler() or "")
    about = os.stat(path)
    return hashlib.sha256("\0".join([*given, path, f"{about.st_size} {about.st_mtime_ns}"]).encode()).hexdigest()[:32]


def _remove_unused() -> None:
    before = time.time() - UNUSED_SECONDS
    for path in KEPT.iterdir():
        if path.stat().st_mtime < before:
            path.unlink(missing_ok=True)
