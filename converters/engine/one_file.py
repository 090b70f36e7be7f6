"""Results that are one file: every tensor's place is known before anything is converted.

Shards are then ranges of that file. Each begins and ends with a page, and is written, read back and journaled like a
file of its own; the header is written last, so that what is not complete is no file of the format.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lowmem_bagel.checkpoint.manifest import READ_BYTES, StoredFile, file_sha256

from .base import Converter
from .disk import PAGE_BYTES
from .shards import Shard
from .source import SourceCheckpoint


@dataclass(frozen=True)
class OneFile:
    """A file that holds a whole result.

    header: what stands before the data, of whole pages. places: where each stored tensor begins, in bytes from the
    file's beginning; each is padded to whole pages.
    """

    name: str
    header: bytes
    places: Mapping[str, int]

    def start(self, shard: Shard) -> int:
        """Where a shard's range begins."""
        return self.places[shard.units[0].specs[0].name]

    def finish(self, folder: Path) -> StoredFile:
        """Write the header into the file, whose data is complete, and hash it all."""
        path = folder / self.name
        with path.open("r+b") as file:
            file.write(self.header)
            file.flush()
            os.fsync(file.fileno())
        return StoredFile(self.name, path.stat().st_size, file_sha256(path))


class MakesOneFile(Protocol):
    """What a converter has that makes one file of all."""

    def one_file(self, checkpoint: SourceCheckpoint, shards: list[Shard]) -> OneFile:
        """The file, for what these shards hold in this order.

        Raises:
            MissingExtraError: a package that lays it out is not installed.
            ConversionError: a tensor that it cannot hold.
        """


def one_file(converter: Converter, checkpoint: SourceCheckpoint, shards: list[Shard]) -> OneFile | None:
    """The file that all goes into; None where shards are files."""
    make = getattr(converter, "one_file", None)
    found: OneFile | None = None if make is None else make(checkpoint, shards)
    assert found is None or not (len(found.header) % PAGE_BYTES or any(p % PAGE_BYTES for p in found.places.values()))
    return found


def range_sha256(path: Path, start: int, nbytes: int) -> str:
    """SHA-256 of a range of a file, of as much of it as there is. OSError passes through."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while nbytes and (piece := file.read(min(nbytes, READ_BYTES))):
            digest.update(piece)
            nbytes -= len(piece)
    return digest.hexdigest()
