"""Streamed units read straight from their shards: for machines whose RAM does not hold the weights."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.safetensors_file import torch_dtype
from ...checkpoint.stored import StoredTensor
from ...errors import CheckpointError
from ...model.flat_buffer import Layout, stack
from ...ops.linear import LOW_RANK
from ...planner.plan import Unit


@dataclass(frozen=True)
class Segment:
    """Bytes of a flat buffer that lie together in a file: `offset` in the file, `start` in the buffer.

    `stored` and `used` are their dtypes, of one size.
    """

    path: Path
    offset: int
    start: int
    nbytes: int
    stored: torch.dtype = torch.uint8
    used: torch.dtype = torch.uint8


@dataclass(frozen=True)
class Kept:
    """Bytes of a flat buffer that are kept in memory (uint8), because converting them changes their size."""

    start: int
    data: Tensor


def segments_of(
    layout: Layout,
    sources: Mapping[str, Sequence[str]],
    locate: Callable[[str], StoredTensor | None],
    read: Callable[[str], Tensor],
) -> list[Segment | Kept] | None:
    """Where a unit's bytes lie on disk, in their order; None where a matrix is stored wider or narrower than used or
    is made of what is stored.

    Norms and biases stored so are small, as are the factors of adapters: `read` reads them at once. `locate` does not
    know what `read` alone makes.
    """
    found: list[Segment | Kept] = []
    for field in layout.fields:
        located = [locate(name) for name in sources[field.path]]
        plain = [stored for stored in located if stored is not None and _read_as_it_is(stored, field.dtype)]
        if len(plain) == len(located):
            start = field.offset
            for stored in plain:
                entry, dtype = stored.entry, torch_dtype(stored.entry.dtype)
                found.append(Segment(stored.file.path, entry.start, start, entry.nbytes, dtype, field.dtype))
                start += entry.nbytes
            if start != field.offset + field.nbytes:
                return None
        elif len(field.shape) == 1 or field.path.endswith(LOW_RANK):
            data = torch.empty(field.nbytes, dtype=torch.uint8)
            stack(data.view(field.dtype).view(field.shape), sources[field.path], read)
            found.append(Kept(field.offset, data))
        else:
            return None
    return found


def _read_as_it_is(stored: StoredTensor, used: torch.dtype) -> bool:
    return stored.as_it_is and _read_as(torch_dtype(stored.entry.dtype), used)


def _read_as(stored: torch.dtype, used: torch.dtype) -> bool:
    """Whether stored bytes become used ones where they lie."""
    floats = stored.is_floating_point and used.is_floating_point
    return stored == used or (floats and stored.itemsize == used.itemsize)


class DiskReader:
    """Reads parts of units from shards, which stay open. See `streaming.Reader`; called on one thread at a time."""

    def __init__(self, units: Mapping[Unit, Sequence[Segment | Kept]], nbytes: Mapping[Unit, int]) -> None:
        self._units, self._nbytes = units, nbytes
        self._files: dict[Path, io.FileIO] = {}

    def nbytes(self, unit: Unit) -> int:
        return self._nbytes[unit]

    def __call__(self, unit: Unit, offset: int, into: Tensor) -> None:
        """Fill `into` (uint8, host memory) with the unit's bytes from `offset` on; gaps of alignment are left.

        Where values are converted, both ends must fall between two of them.

        Raises:
            CheckpointError: a shard vanished, shrank or cannot be read.
        """
        for part in self._units[unit]:
            nbytes = part.data.numel() if isinstance(part, Kept) else part.nbytes
            first, last = max(part.start, offset), min(part.start + nbytes, offset + into.numel())
            if first >= last:
                continue
            target = into[first - offset : last - offset]
            if isinstance(part, Kept):
                target.copy_(part.data[first - part.start : last - part.start])
                continue
            self._read(part.path, part.offset + first - part.start, target.numpy().data)
            if part.stored != part.used:
                target.copy_(target.view(part.stored).to(part.used).view(torch.uint8))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _read(self, path: Path, offset: int, target: memoryview) -> None:
        try:
            if path not in self._files:
                self._files[path] = io.FileIO(path)
            file, done = self._files[path], 0
            file.seek(offset)
            while done < len(target):
                count = file.readinto(target[done:])
                if not count:
                    raise CheckpointError(f"{path}: ends before its weights while they are streamed; restore the file")
                done += count
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read while streaming ({error.strerror or error})") from error
