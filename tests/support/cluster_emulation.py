"""Kernels of clusters compiled by g++ with `cluster_emulation.h`, behind the interface of `kernels.nvrtc.Module`."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowmem_bagel.kernels import nvrtc
from support.built import library
from support.cuda_emulation import OPTIONS

HEADER = Path(__file__).with_name("cluster_emulation.h")
HALF_PAIR = "inline u32 half_pair(float low, float high) { return half_bits(low) | half_bits(high) << 16; }"


class Matrix(ctypes.Structure):
    """What stands for a tensor map: rows of bytes."""

    _fields_ = (("base", ctypes.c_uint64), ("columns", ctypes.c_uint64), ("rows", ctypes.c_uint64))
    _align_ = 64


def matrix(address: int, rows: int, width: int) -> Any:
    """In the place of `pairs.tensor_map`."""
    raw = (ctypes.c_char * 192)()
    made = (ctypes.c_char * 128).from_buffer(raw, -ctypes.addressof(raw) % 64)
    made[: ctypes.sizeof(Matrix)] = bytes(Matrix(address, width, rows))
    return made


@functools.cache
def _library(source: str, defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    text = re.sub(r"^typedef unsigned (?:int|short|long long) \w+;$", "", nvrtc.source_text(source), flags=re.MULTILINE)
    text, found = re.subn(r"extern __shared__ uint4 shared\[\];", "void* const shared = own_memory;", text)
    (kernel,) = re.findall(r"^(\w+)\(const __grid_constant__ (.*?)\) {$", text, flags=re.MULTILINE | re.DOTALL)
    assert found == 1
    parameters = ("const __grid_constant__ " + kernel[1]).replace("\n", " ").split(",")
    kinds = [re.sub(r"__grid_constant__|\w+$", "", parameter.strip()).strip() for parameter in parameters]
    values = ", ".join(f"*static_cast<{kind}*>(arguments[{i}])" for i, kind in enumerate(kinds))
    unit = f"""
#include "{HEADER.name}"
unsigned char* own_memory;
{text}
{HALF_PAIR}
extern "C" void emulate(void** arguments, u32 blocks) {{
    gridDim = {{blocks, 1, 1}};
    for (u32 block = 0; block < blocks; block += emulation::PAIR)
        emulation::run_cluster(block, [=](unsigned char* memory) {{ own_memory = memory, {kernel[0]}({values}); }});
}}
"""
    return library(
        unit, HEADER, [*OPTIONS, "-pthread", *(f"-D{name}={value}" for name, value in defines)], HEADER.parent.absolute
    )


class Kernel:
    """Stands in for `nvrtc.CudaKernel`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __call__(self, grid: tuple[int, int], threads: int, arguments: Sequence[Any]) -> None:
        values = [ctypes.c_uint64(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        self._library.emulate(pointers, grid[0])


class Module:
    """Stands in for `nvrtc.Module`."""

    def __init__(self, source: str, defines: Mapping[str, int]) -> None:
        self._library = _library(source, tuple(sorted(defines.items())))

    def kernel(self, name: str, shared_bytes: int = 0) -> Kernel:
        return Kernel(self._library)
