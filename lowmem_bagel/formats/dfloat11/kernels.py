"""DFloat11 weights decoded on the GPU: several groups in one launch, on torch's current stream.

`dfloat11.cu` is the kernel; the CPU codec, which is also its reference, is `codec.py`. Beyond the stored
tensors the kernel needs one derived table a group (21 or 37 KB), which lets it decode up to four codes at a lookup.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...kernels import nvrtc

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SOURCE = "formats/dfloat11/dfloat11.cu"
TABLE_BITS = 11
"""Bits that one lookup of the kernel takes; longer codes, about one in two thousand, go through the stored tables."""
WIDE_TABLE_BITS = 12
"""The same on multiprocessors whose shared memory holds three blocks with the larger tables."""
THREADS = 512
WINDOW_BYTES = 8
GAP_BITS = 5
MAX_LUTS = 17
"""Byte-wise tables a group can have: values from 240 on point to table 256 - value."""
ALIGNMENT = 16
"""Bytes; of every component's address and of the output."""

_SHARED_OF_WIDE_TABLES = 3 * 52 * 1024
"""Bytes: three blocks with a table of 32 KB, the stored tables and the exponents of a tile."""
_SHARED_SLACK = 16
_DESCRIPTOR = (
    "table", "lut_tables", "encoded", "encoded_bytes", "signs", "positions", "gaps", "weights", "first_tile", "tiles",
    "out_offset",
)  # fmt: skip
"""The int64 fields of the kernel's struct Group, in order."""


class Status(IntFlag):
    """What a decode found; the kernel ORs into a word on the device."""

    COUNT_MISMATCH = 1
    """A tile held another number of codes than its positions say: the file or the copy of it is corrupt."""
    FP16_OVERFLOW = 2
    """A finite weight does not fit fp16."""


@dataclass(frozen=True)
class KernelGroup:
    """One DFloat11 group: what the host must know of it, and where its four large components lie.

    `luts` [k+1, 256] and `positions` [tiles+1] are host copies of the stored tensors, uint8 and uint32. The addresses
    are absolute, or offsets from the `base` that a decode is given, in bytes, and multiples of ALIGNMENT.
    """

    luts: npt.NDArray[np.uint8]
    positions: npt.NDArray[np.uint32]
    weights: int
    encoded_bytes: int
    encoded_exponent: int
    sign_mantissa: int
    output_positions: int
    gaps: int

    def __post_init__(self) -> None:
        assert self.luts.shape[1:] == (256,)
        assert 2 <= len(self.luts) <= MAX_LUTS + 1
        assert self.tiles >= 1
        assert 0 < self.encoded_bytes < 2**31
        assert 0 < self.weights < 2**32
        addresses = (self.encoded_exponent, self.sign_mantissa, self.output_positions, self.gaps)
        assert all(address % ALIGNMENT == 0 for address in addresses), "components must be aligned to 16 bytes"

    @property
    def tiles(self) -> int:
        return len(self.positions) - 1

    @property
    def largest_tile(self) -> int:
        """Weights in the largest tile."""
        return int(np.diff(self.positions.astype(np.int64)).max(initial=0))

    @classmethod
    def of_tensors(
        cls, luts: Tensor, encoded_exponent: Tensor, sign_mantissa: Tensor, output_positions: Tensor, gaps: Tensor
    ) -> KernelGroup:
        """A group whose components are resident tensors (uint8, contiguous); the caller keeps them alive.

        `luts` and `output_positions` are copied to the host, which waits for the device.
        """
        import torch

        positions = output_positions.cpu().contiguous().view(torch.uint8).numpy().view(np.uint32)
        assert gaps.numel() * 8 >= (len(positions) - 1) * THREADS * GAP_BITS, "gaps end before the last tile"
        components = (encoded_exponent, sign_mantissa, output_positions, gaps)
        assert all(tensor.is_contiguous() for tensor in components)
        return cls(
            luts.cpu().numpy(), positions, sign_mantissa.numel(), encoded_exponent.numel(),
            encoded_exponent.data_ptr(), sign_mantissa.data_ptr(), output_positions.data_ptr(), gaps.data_ptr(),
        )  # fmt: skip


def why_unavailable(device: torch.device) -> str | None:
    """None where the kernel runs, otherwise the reason."""
    return nvrtc.why_unavailable(device)


def best_table_bits(device: torch.device) -> int:
    """WIDE_TABLE_BITS where a multiprocessor's shared memory holds three blocks with tables that wide."""
    if device.type != "cuda":
        return TABLE_BITS
    # The most that one block may have is all of a multiprocessor's but 1 KB, or less.
    return WIDE_TABLE_BITS if nvrtc.max_shared_bytes(device) >= _SHARED_OF_WIDE_TABLES else TABLE_BITS


def decoder_module(device: torch.device, table_bits: int = TABLE_BITS, **defines: int) -> nvrtc.Module:
    """The compiled kernel; `defines` are the other macros of dfloat11.cu, for tuning."""
    return nvrtc.load(SOURCE, device, {"TABLE_BITS": table_bits, **defines})


class CudaDecoder:
    """Decodes a fixed set of groups into one flat buffer by one launch.

    `offsets[i]` is where group i begins in the buffer and `numel` the buffer's size, both in elements. Everything is
    prepared here, so that `decode_into` neither waits for the device nor allocates, and can be captured in a graph.

    Raises:
        CudaError: the kernel cannot be compiled or does not fit this GPU; see `why_unavailable`.
    """

    def __init__(
        self,
        groups: Sequence[KernelGroup],
        device: torch.device,
        dtype: torch.dtype,
        module: nvrtc.Module | None = None,
        table_bits: int | None = None,
    ) -> None:
        import torch

        assert groups
        assert dtype in (torch.bfloat16, torch.float16)
        self.dtype = dtype
        self.device = device
        if table_bits is None:
            table_bits = best_table_bits(device) if module is None else TABLE_BITS
        module = decoder_module(device, table_bits) if module is None else module
        sizes = [_round_up(group.weights, ALIGNMENT // 2) for group in groups]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.numel = sum(sizes)
        self.status = torch.zeros(1, dtype=torch.int32, device=device)
        """ORed `Status` bits of all decodes so far."""

        lut_bytes = max(len(group.luts) for group in groups) * 256
        step_bytes = 2 * 4 * 2**table_bits
        tables = np.zeros((len(groups), step_bytes + lut_bytes), np.uint8)
        for row, group in zip(tables, groups, strict=True):
            row[:step_bytes] = step_tables(group.luts, table_bits).reshape(-1).view(np.uint8)
            row[step_bytes:][: group.luts.size] = group.luts.reshape(-1)
        self._tables = torch.from_numpy(tables).to(device)
        self._groups = torch.from_numpy(self._describe(groups)).to(device)
        self._tiles = sum(group.tiles for group in groups)
        self._capacity = max(group.largest_tile for group in groups)
        self._lut_bytes = lut_bytes
        shared = step_bytes + lut_bytes + _round_up(self._capacity + _SHARED_SLACK, 16)
        self._kernel = module.kernel("decode_bf16" if dtype == torch.bfloat16 else "decode_fp16", shared)
        self._blocks = min(self._tiles, self._kernel.resident_blocks(THREADS))

    def decode_into(self, out: Tensor, base: int = 0) -> None:
        """Write all groups' weights to `out`, flat, `numel` elements of the decoder's dtype; equal bits in bf16.

        `base` is added to every address of the groups: 0 for resident tensors, a slot's address for streamed ones.
        """
        assert out.dtype == self.dtype
        assert out.is_contiguous()
        assert out.numel() >= self.numel
        assert out.data_ptr() % ALIGNMENT == 0
        assert base % ALIGNMENT == 0
        arguments: list[Any] = [
            self._groups,
            ctypes.c_int32(self._tiles),
            ctypes.c_int32(self._capacity),
            ctypes.c_int32(self._lut_bytes),
            ctypes.c_uint64(base),
            out,
            self.status,
        ]
        self._kernel((self._blocks, 1), THREADS, arguments)

    def found(self) -> Status:
        """The status bits; waits for the device."""
        return Status(int(self.status.item()))

    def _describe(self, groups: Sequence[KernelGroup]) -> npt.NDArray[np.int64]:
        rows = np.zeros((len(groups), len(_DESCRIPTOR)), np.int64)
        first_tile = 0
        for i, group in enumerate(groups):
            values = {
                "table": self._tables[i].data_ptr(),
                "lut_tables": len(group.luts) - 1,
                "encoded": group.encoded_exponent,
                "encoded_bytes": group.encoded_bytes,
                "signs": group.sign_mantissa,
                "positions": group.output_positions,
                "gaps": group.gaps,
                "weights": group.weights,
                "first_tile": first_tile,
                "tiles": group.tiles,
                "out_offset": self.offsets[i],
            }
            rows[i] = [values[name] for name in _DESCRIPTOR]
            first_tile += group.tiles
        return rows


def step_tables(luts: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """The kernel's multi-symbol tables [2, 2**bits] from a group's byte-wise tables [k+1, 256].

    Row 0, `steps`: bits 0-5 the length of all codes, 8-10 their count (the whole entry 0: the first code is longer than
    `bits`), 16-19, 20-23, 24-27 where the second, third and fourth begin, 0 where there is none. Row 1, `symbols`: up
    to four exponents, first lowest, each rotated right by one bit, which is how a bf16's two bytes hold it.
    """
    from .loops import step_tables as fill  # not before it is used, because it imports numba

    tables = np.empty((2, 2**bits), np.uint32)
    fill(luts, bits, *tables)
    return tables


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple
