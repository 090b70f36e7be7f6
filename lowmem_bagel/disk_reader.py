"""Streamed units read straight from their shards: for machines whose RAM does not hold the weights."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .errors import CheckpointError
from .folder import StoredTensor
from .model.blob import Layout
from .plan import Unit
from .safetensors_file import torch_dtype


@dataclass(frozen=True)
class Segment:
    """Bytes of a blob that lie together in a file: `offset` in the file, `start` in the blob."""

    path: Path
    offset: int
    start: int
    nbytes: int


def segments_of(
    layout: Layout, sources: Mapping[str, Sequence[str]], locate: Callable[[str], StoredTensor]
) -> list[Segment] | None:
    """Where a unit's blob lies on disk, in the blob's order; None where a tensor is not stored as it is used."""
    found: list[Segment] = []
    for field in layout.fields:
        start = field.offset
        for name in sources[field.path]:
            stored = locate(name)
            if torch_dtype(stored.entry.dtype) != field.dtype:
                return None
            found.append(Segment(stored.file.path, stored.entry.start, start, stored.entry.nbytes))
            start += stored.entry.nbytes
        if start != field.offset + field.nbytes:
            return None
    return found


class DiskReader:
    """Reads parts of blobs from shards, which stay open. See `streaming.Reader`; called on one thread at a time."""

    def __init__(self, units: Mapping[Unit, Sequence[Segment]], nbytes: Mapping[Unit, int]) -> None:
        self._units, self._nbytes = units, nbytes
        self._files: dict[Path, io.FileIO] = {}

    def nbytes(self, unit: Unit) -> int:
        return self._nbytes[unit]

    def __call__(self, unit: Unit, offset: int, into: Tensor) -> None:
        """Fill `into` (uint8, host memory) with the blob's bytes from `offset` on; gaps of alignment are left.

        Raises:
            CheckpointError: a shard vanished, shrank or cannot be read.
        """
        end, target = offset + into.numel(), into.numpy().data
        for segment in self._units[unit]:
            first, last = max(segment.start, offset), min(segment.start + segment.nbytes, end)
            if first < last:
                self._read(segment.path, segment.offset + first - segment.start, target[first - offset : last - offset])

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
