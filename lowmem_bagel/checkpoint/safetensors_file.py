"""Files of tensors; safetensors: a header that is validated before anything is believed, and tensors without copies.

The format is 8 bytes of header length, a JSON header, then the data. The `safetensors` package reads it too, but
hides the byte ranges that streaming, conversion and verification work on.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import CheckpointError
from ..files import MAX_JSON_BYTES, open_file, parse_json
from .first_bytes import FIRST_BYTES, text_instead, what_instead
from .gguf_blocks import BLOCK_TYPES

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "U64": 8, "U32": 4, "U16": 2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `start` is the offset in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says of its tensors. `metadata`: the texts that whoever wrote it put beside them. `nbytes`: where the
    data begins."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    nbytes: int


class TensorFile:
    """A memory-mapped file of tensors. Opening reads only the header.

    Raises:
        CheckpointError: missing, truncated, something else, or with a header that does not describe the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_file(path) as file:
                self.size = file.seek(0, 2)
                file.seek(0)
                header = self._read_header(file)
                self.entries, self.metadata, self.header_bytes = header.entries, header.metadata, header.nbytes
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(f"{path.parent}: {path.name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error

    def _read_header(self, file: BinaryIO) -> Header:
        raise NotImplementedError

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes, not copied."""
        entry = self.entries[name]
        return memoryview(self._map)[entry.start : entry.start + entry.nbytes]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a read-only view of the file: clone it before writing or keeping it.

        The view may not be aligned to more than one byte; `clone()` aligns it.
        """
        import torch

        entry = self.entries[name]
        dtype = torch_dtype(entry.dtype)
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        data = torch.frombuffer(self._writable(), dtype=torch.uint8, count=entry.nbytes, offset=entry.start)
        if entry.start % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(entry.shape)

    def _writable(self) -> ctypes.Array[ctypes.c_char]:
        """The map under a type that calls itself writable, which torch wants; the pages are not, and a write faults.

        A private writable map would do too, but counts its whole size against the machine's memory.
        """
        import numpy as np

        address = np.frombuffer(self._map, dtype=np.uint8).ctypes.data
        array = (ctypes.c_char * self.size).from_address(address)
        array.owner = self._map  # type: ignore[attr-defined]  # torch keeps the array, and that the map
        return array


class SafetensorsFile(TensorFile):
    """A safetensors file."""

    def _read_header(self, file: BinaryIO) -> Header:
        return _read_header(self.path, file, self.size)


@cache
def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name; blocks of GGUF's types are bytes."""
    import torch

    if name in BLOCK_TYPES:
        return torch.uint8
    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    }[name]  # fmt: skip


def _read_header(path: Path, file: BinaryIO, size: int) -> Header:
    head = file.read(FIRST_BYTES)
    length = int.from_bytes(head[:8], "little")
    other = what_instead(head) if head[8:9] != b"{" else None
    if other is not None:
        raise CheckpointError(f"{path}: not a safetensors file but {other}")
    if len(head) < 8 or length > min(size - 8, MAX_JSON_BYTES):
        other = text_instead(head)
        if other is not None:
            raise CheckpointError(f"{path}: not a safetensors file but {other}")
        raise CheckpointError(f"{path}: truncated or not a safetensors file; download it again")
    file.seek(8)
    try:
        header = parse_json(file.read(length))
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); get the file anew") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; get the file anew")
    metadata = header.pop("__metadata__", None)
    texts = {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}
    data_start = 8 + length
    entries = {name: _entry(path, name, value, data_start, size) for name, value in header.items()}
    check_overlaps(path, entries.values(), data_start)
    return Header(entries, texts, data_start)


def check_overlaps(path: Path, entries: Iterable[TensorEntry], end: int) -> None:
    """Raises CheckpointError where tensors share bytes, or one begins before `end`, where the header ends."""
    for entry in sorted(entries, key=lambda e: (e.start, e.nbytes)):
        if entry.start < end:
            raise CheckpointError(f"{path}: tensor {entry.name} overlaps another; get the file anew")
        end = entry.start + entry.nbytes


def _entry(path: Path, name: str, value: object, data_start: int, size: int) -> TensorEntry:
    def damaged(what: str, remedy: str = "get the file anew") -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name}: {what}; {remedy}")

    if not isinstance(value, dict):
        raise damaged("its header entry is not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise damaged(f"unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise damaged("its shape is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise damaged("its data offsets are wrong")
    nbytes = DTYPE_BYTES[dtype]
    for n in shape:
        nbytes *= n
    start, end = offsets
    if end - start != nbytes:
        raise damaged(f"its shape needs {nbytes} bytes and the header gives {end - start}")
    if data_start + end > size:
        raise damaged("the file ends before its data (truncated)", "download it again")
    return TensorEntry(name, dtype, tuple(shape), data_start + start, nbytes)
