"""Encoded shards on their way to the disk, while the next ones are encoded.

One thread writes a shard's file while another hashes its tensors; a third syncs the file before, has the disk return
it, and a fourth hashes what comes back. So every byte is hashed once in memory, by its tensor, and once as the file
that lies on the disk. That both are the same bytes is shown by sums over their pages, which cost a twentieth of a hash:
a page that the disk lost, mixed up or altered has another sum (but for one in 2^64), and whoever wants to deceive could
as well replace file and hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from types import TracebackType
from typing import TYPE_CHECKING

from lowmem_bagel.checkpoint.manifest import StoredFile, TensorRecord
from lowmem_bagel.errors import ConversionError

from .disk import PAGE_BYTES, DirectFile, page_aligned
from .fsio import fsync_folder, rename
from .one_file import OneFile
from .phases import FILE_HASH, READ_BACK, STORED_HASH, SYNC, WRITE, Phases
from .shards import header, tensor_bytes, tensor_sha256

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

    from torch import Tensor

WAITING_BYTES = 1 << 30
"""Encoded bytes that may wait to be written, together with what is read ahead."""
MAX_UNFINISHED = 3
"""Shards that are encoded and not yet journaled; what a kill can cost, besides the one that is being encoded."""
PIECE_BYTES = 8 << 20

Settle = Callable[[StoredFile, list[TensorRecord]], None]


@dataclass(frozen=True)
class Pending:
    """An encoded tensor that waits to be written. Its record lacks the hash where that is "" yet."""

    record: TensorRecord
    stored: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Written:
    """A file as it was written, still under its temporary name, or from `start` on a range of one: its pieces' lengths
    and sums of pages."""

    file: DirectFile
    pieces: list[tuple[int, bytes]]
    start: int = 0


class Finishing:
    """Takes encoded shards and calls `settle` for each that is safely on disk, in order, on a thread of its own.

    Use as a context manager: its end waits until all is settled. Where the block was left by an exception, what was
    added before is settled still, and the block's exception is the one that is raised.
    """

    def __init__(self, folder: Path, settle: Settle, phases: Phases, whole: OneFile | None = None) -> None:
        """`whole`: the file that shards are ranges of, where they are."""
        self._folder, self._settle, self._phases, self._whole = folder, settle, phases, whole
        self._writer, self._checker, self._tensor_hasher, self._file_hasher = self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=name)
            for name in ("write", "read-back", "hash-stored", "hash-file")
        ]
        self._unfinished: deque[Future[Future[None]]] = deque()
        self._waiting = self._writing = 0
        self._written = Condition()

    def __enter__(self) -> Finishing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in self._threads:
            thread.shutdown()
        while error is None and self._unfinished:
            self._settle_oldest()

    def add(self, name: str, pending: list[Pending]) -> None:
        """Finish a shard. Waits where too much waits already.

        Raises:
            ConversionError, OSError: an earlier shard could not be finished.
        """
        while len(self._unfinished) >= MAX_UNFINISHED:
            self._settle_oldest()
        size = sum(item.record.bytes for item in pending)
        self.wait_for_room(size)
        with self._written:
            self._waiting += size
        self._unfinished.append(self._writer.submit(self._write, name, pending, size))

    def wait_for_room(self, nbytes: int) -> None:
        """Wait until `nbytes` more are no more than may wait, or nothing waits."""
        with self._written:
            self._written.wait_for(lambda: not self._waiting or self._waiting + nbytes <= WAITING_BYTES)

    def _settle_oldest(self) -> None:
        self._unfinished.popleft().result().result()

    def _write(self, name: str, pending: list[Pending], size: int) -> Future[None]:
        """Write a shard under a temporary name, and have it checked."""
        self._writing = size
        try:
            hashed = self._tensor_hasher.submit(self._records, deque(pending))
            tensors = {stored: tensor for item in pending for stored, tensor in item.stored.items()}
            assert len(tensors) == sum(len(item.stored) for item in pending), "two tensors are stored under one name"
            pending.clear()
            if self._whole is None:
                written = self._write_file(self._folder / f"{name}.tmp", _parts(tensors))
            else:
                start = self._whole.places[next(iter(tensors))]
                written = self._write_file(self._folder / self._whole.name, _padded(tensors), start)
            records = hashed.result()
        finally:
            self._let_go(size)
        return self._checker.submit(self._check, written, self._folder / name, records)

    def _let_go(self, nbytes: int) -> None:
        """So much of the shard that is being written waits no longer, or what was left of it."""
        with self._written:
            nbytes = min(nbytes, self._writing)
            self._writing -= nbytes
            self._waiting -= nbytes
            self._written.notify_all()

    def _records(self, pending: deque[Pending]) -> list[TensorRecord]:
        """With their hashes. A tensor is let go once it was hashed."""
        return [self._hashed(pending.popleft()) for _ in range(len(pending))]

    def _hashed(self, item: Pending) -> TensorRecord:
        if item.record.sha256:
            return item.record
        with self._phases(STORED_HASH):
            return dataclasses.replace(item.record, sha256=tensor_sha256(item.stored.values()))

    def _write_file(self, path: Path, parts: Iterator[memoryview], start: int | None = None) -> _Written:
        """A file of its own; or, from `start` on, a range of one."""
        file, pieces = DirectFile(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if start is None else 0)), []
        try:
            file.seek(start or 0)
            for piece in _pieces(parts):
                with self._phases(WRITE):
                    file.write(piece)
                    pieces.append((len(piece), _page_sums(piece)))
                self._let_go(len(piece))
        except BaseException:
            file.close()
            raise
        return _Written(file, pieces, start or 0)

    def _check(self, written: _Written, path: Path, records: list[TensorRecord]) -> None:
        """Sync the file, have it returned, give it its name, and settle it."""
        with written.file as file, self._phases(SYNC):
            file.sync()
            file.forget()
        sha256 = self._read_back(written)
        if self._whole is None:
            rename(written.file.path, path)
        fsync_folder(path.parent)
        self._settle(StoredFile(path.name, sum(length for length, _ in written.pieces), sha256), records)

    def _read_back(self, written: _Written) -> str:
        """The hash of what the disk returns. A piece is hashed while the next one is read."""
        digest, hashed = hashlib.sha256(), None
        rooms = [page_aligned(PIECE_BYTES).data for _ in range(2)]
        with DirectFile(written.file.path) as file:
            for k, (length, sums) in enumerate(written.pieces):
                room = rooms[k % 2] if self._whole is None else rooms[k % 2][:length]
                with self._phases(READ_BACK):
                    count = file.read_into(room, written.start + k * PIECE_BYTES)
                    same = count == length and _page_sums(room[:length]) == sums
                if hashed is not None:
                    hashed.result()
                if not same:
                    raise ConversionError(f"{file.path}: the disk returned other bytes than were written; check it")
                hashed = self._file_hasher.submit(self._hash, digest, room[:length])
        if hashed is not None:
            hashed.result()
        return digest.hexdigest()

    def _hash(self, digest: Hash, piece: memoryview) -> None:
        with self._phases(FILE_HASH):
            digest.update(piece)


def _pieces(parts: Iterator[memoryview]) -> Iterator[memoryview]:
    """The same bytes, in pieces of one size but for the last, each valid until the next is asked for."""
    room, filled = page_aligned(PIECE_BYTES).data, 0
    for data in parts:
        while len(data):
            part = data[: PIECE_BYTES - filled]
            room[filled : filled + len(part)] = part
            data, filled = data[len(part) :], filled + len(part)
            if filled == PIECE_BYTES:
                yield room
                filled = 0
    if filled:
        yield room[:filled]


def _parts(tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    """A safetensors file. A tensor is let go once it was taken."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # keeps every tensor aligned
    yield header(ordered)
    ordered.reverse()
    tensors.clear()
    while ordered:
        yield tensor_bytes(ordered.pop()[1])


def _padded(tensors: dict[str, Tensor]) -> Iterator[memoryview]:
    """The tensors in their order, each padded to whole pages, and let go once it was taken."""
    for name in tuple(tensors):
        data = tensor_bytes(tensors.pop(name))
        yield data
        yield memoryview(bytes(-len(data) % PAGE_BYTES))


def _page_sums(piece: memoryview) -> bytes:
    """A 64-bit sum a page, and the rest of the bytes as they are."""
    import numpy as np

    data = np.frombuffer(piece, np.uint8)
    whole = data.size // PAGE_BYTES * PAGE_BYTES
    sums = np.add.reduce(data[:whole].view(np.uint64).reshape(-1, PAGE_BYTES // 8), axis=1)
    return bytes(sums) + bytes(data[whole:])
