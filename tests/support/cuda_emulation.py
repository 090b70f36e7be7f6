"""The project's CUDA sources compiled by g++ with `cuda_emulation.h`, behind the interface of `kernels.nvrtc.Module`.

The emulation runs the kernels' own source, statement by statement, so that indices, tables, barriers and rounding are
tested where there is no GPU; it says nothing about speed.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem_bagel.kernels import nvrtc
from support.built import compile_with, library
from support.built import compiler as compiler

SHARED_BYTES = 232448
"""What a block may use on the largest GPUs."""
POISON = 0xA5


HEADER = Path(__file__).with_name("cuda_emulation.h")
OPTIONS = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-w"]


@functools.cache
def _compiled_header() -> Path:
    """The folder of the emulation compiled once: reading what it includes is much of what each source takes."""
    folder = Path(tempfile.mkdtemp(prefix="cuda-emulation-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copy(HEADER, folder)
    compile_with([*OPTIONS, "-x", "c++-header", HEADER.name, "-o", f"{HEADER.name}.gch"], folder)
    return folder


@functools.cache
def _library(source: str, defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    text = nvrtc.source_text(source)
    kernels = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\(.*\)\s*)?(\w+)\(', text)
    assert kernels, f"{source} has no kernel"
    unit = "\n".join(
        [
            f'#include "{HEADER.name}"',
            f"alignas(128) uint4 shared[{SHARED_BYTES // 16}];",
            text.replace("extern __shared__", "extern"),
            *(f"EMULATED_KERNEL({name})" for name in kernels),
        ]
    )
    return library(unit, HEADER, [*OPTIONS, *(f"-D{name}={value}" for name, value in defines)], _compiled_header)


class Kernel:
    """Stands in for `nvrtc.CudaKernel`."""

    def __init__(self, library: ctypes.CDLL, name: str, shared_bytes: int, descending: bool, blocks: int) -> None:
        assert shared_bytes <= SHARED_BYTES
        self._function = getattr(library, f"emulate_{name}")
        self._shared = (ctypes.c_char * SHARED_BYTES).in_dll(library, "shared")
        self._shared_bytes = shared_bytes
        self._descending = descending
        self._blocks = blocks

    def resident_blocks(self, threads: int) -> int:
        return self._blocks

    def __call__(self, grid: tuple[int, int], threads: int, arguments: Sequence[Any]) -> None:
        values = [ctypes.c_uint64(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        ctypes.memset(self._shared, POISON, SHARED_BYTES)
        self._function(pointers, grid[0], grid[1], threads, int(self._descending))
        beyond = bytes(self._shared)[self._shared_bytes :]
        assert beyond.count(POISON) == len(beyond), "wrote beyond the shared memory asked for"


class Module:
    """Stands in for `nvrtc.Module`."""

    def __init__(
        self, source: str, defines: Mapping[str, int] | None = None, descending: bool = False, blocks: int = 3
    ) -> None:
        self._library = _library(source, tuple(sorted((defines or {}).items())))
        self._descending = descending
        self._blocks = blocks

    def kernel(self, name: str, shared_bytes: int = 0) -> Kernel:
        return Kernel(self._library, name, shared_bytes, self._descending, self._blocks)


@dataclass(frozen=True)
class CudaSources:
    """Where our CUDA sources run, and what loads them."""

    device: torch.device
    load: Callable[..., Any] | None
    """None: NVRTC, on a card."""
