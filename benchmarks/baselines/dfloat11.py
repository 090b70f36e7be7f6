"""The `dfloat11` package's own kernel behind our linears: to compare with, and where ours cannot be compiled.

Only the package's PTX file is used. The package itself is not imported: it needs cupy and setuptools' pkg_resources,
and reads the PTX at import. cupy launches the kernel as the package does, where it is installed; else CUDA's driver.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_bagel.errors import MissingExtraError, SettingError
from lowmem_bagel.formats.base import Site, StoredLinears
from lowmem_bagel.formats.dfloat11.kernels import ALIGNMENT, THREADS, WINDOW_BYTES, KernelGroup
from lowmem_bagel.formats.dfloat11.linear import CompressedGroups, DFloat11Linears, GroupDecoder, Scratch
from lowmem_bagel.hardware.features import why_off
from lowmem_bagel.kernels import nvrtc

if TYPE_CHECKING:
    Launch = Callable[[int, int, Sequence[int], Sequence[int]], None]
    """(blocks, bytes of shared memory, addresses, 32-bit numbers): queue the kernel on torch's current stream."""

ENTRY = "decode"
BLOCK_BYTES = THREADS * WINDOW_BYTES
"""Encoded bytes that a block decodes."""


def package(site: Site) -> StoredLinears:
    """By the dfloat11 package's kernel.

    Raises:
        MissingExtraError: the package is not installed.
        SettingError: it is switched off, or cannot write what is asked for.
    """
    off = why_off("dfloat11")
    if off is not None:
        raise SettingError(f"the dfloat11 package is {off}; unset it, or choose another backend")
    if site.dtype != torch.bfloat16:
        raise SettingError("the dfloat11 package's kernel writes bfloat16 alone; choose backend auto")
    launch, by = launcher(site.device)

    def make(groups: Sequence[KernelGroup], device: torch.device, dtype: torch.dtype) -> GroupDecoder:
        return PackageDecoder(groups, device, dtype, launch)

    assert site.dense is not None
    scratch = Scratch(site.device, site.dtype)
    by = f" by the dfloat11 package's kernel through {by}"
    return DFloat11Linears(CompressedGroups(site.folder), site.dense, scratch, make, by)


def ptx_file() -> Path:
    """The package's PTX.

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec("dfloat11")
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0]) / "decode.ptx" if folders else None
    if path is None or not path.exists():
        raise MissingExtraError(
            'the dfloat11 package is missing; install it with: pip install "lowmem-bagel[dfloat11]"'
        )
    return path


def launcher(device: torch.device) -> tuple[Launch, str]:
    """What launches the package's kernel on a device, and its name.

    Raises:
        MissingExtraError: the package is not installed, or neither cupy nor cuda-bindings.
    """
    path = ptx_file()
    if importlib.util.find_spec("cupy") is not None:
        return _by_cupy(path, device), "cupy"
    try:
        return _by_driver(path, device), "cuda-bindings"
    except ImportError as error:
        raise MissingExtraError(
            f"the dfloat11 package's kernel needs cupy or cuda-bindings ({error}); pip install cuda-bindings"
        ) from error


class PackageDecoder:
    """Decodes groups one launch after the other, as the package does; otherwise as `CudaDecoder`, in bf16."""

    def __init__(self, groups: Sequence[KernelGroup], device: torch.device, dtype: torch.dtype, launch: Launch) -> None:
        assert dtype == torch.bfloat16, "the package's kernel writes bf16"
        self._groups, self._launch = list(groups), launch
        self._luts = [torch.from_numpy(group.luts.copy()).to(device) for group in groups]
        each = ALIGNMENT // dtype.itemsize
        sizes = [-(-group.weights // each) * each for group in groups]
        self.offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self.numel = sum(sizes)

    def decode_into(self, out: Tensor, base: int = 0) -> None:
        """Write all groups' weights to `out`, flat bf16; `base` is added to the addresses of the groups."""
        assert out.dtype == torch.bfloat16 and out.is_contiguous() and out.numel() >= self.numel
        for group, luts, offset in zip(self._groups, self._luts, self.offsets, strict=True):
            addresses = [luts.data_ptr()]
            addresses += [base + a for a in (group.encoded_exponent, group.sign_mantissa, group.output_positions)]
            addresses += [base + group.gaps, out.data_ptr() + offset * out.itemsize]
            self._launch(
                -(-group.encoded_bytes // BLOCK_BYTES),
                THREADS * 4 + 4 + group.largest_tile * 2,
                addresses,
                [len(group.luts), group.encoded_bytes, group.weights],
            )


def _by_cupy(path: Path, device: torch.device) -> Launch:
    import cupy
    import numpy as np

    kernel = cupy.RawModule(path=str(path)).get_function(ENTRY)

    def launch(blocks: int, shared_bytes: int, addresses: Sequence[int], numbers: Sequence[int]) -> None:
        with torch.cuda.device(device):
            if shared_bytes > nvrtc.DEFAULT_SHARED_BYTES:
                kernel.max_dynamic_shared_size_bytes = shared_bytes
            stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream)
            arguments = (*(np.uint64(a) for a in addresses), *(np.int32(n) for n in numbers))
            with stream:
                kernel((blocks,), (THREADS,), arguments, shared_mem=shared_bytes)

    return launch


def _by_driver(path: Path, device: torch.device) -> Launch:
    from cuda.bindings import driver  # noqa: F401 - its absence is the caller's to report

    module = nvrtc.Module(path.read_bytes() + b"\0", device)

    def launch(blocks: int, shared_bytes: int, addresses: Sequence[int], numbers: Sequence[int]) -> None:
        arguments: list[Any] = [ctypes.c_uint64(a) for a in addresses]
        arguments += [ctypes.c_int32(n) for n in numbers]
        module.kernel(ENTRY, shared_bytes)((blocks, 1), THREADS, arguments)

    return launch
