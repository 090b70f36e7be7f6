"""Reading a source's tensors into private memory, hashing them meanwhile, and rounding those that are not bf16.

A memory map would cost nothing in RAM either, but a file that shrinks under a map kills the process with SIGBUS, where
a short read is an error that names the tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_bagel.checkpoint.safetensors_file import TensorEntry, torch_dtype
from lowmem_bagel.checkpoint.stored import Piece, StoredTensor
from lowmem_bagel.checkpoint.tensors import TensorSpec
from lowmem_bagel.errors import ConversionError

from .base import SourceTensor
from .disk import PAGE_BYTES, DirectFile
from .phases import READ, SOURCE_HASH, Phases
from .room import Room
from .rounding import Norms, relative, round_into
from .shards import tensor_bytes

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

    from torch import Tensor

READ_BYTES = 8 << 20
SMALL_BYTES = 64 << 10
"""Fewer than these take less time than another thread takes to hear of them."""

Waiting = Callable[[], SourceTensor]
"""A tensor that was read: waits until it is hashed too."""


@dataclass(frozen=True)
class _InMemory(Piece):
    """A piece that was read."""

    data: Tensor

    def tensor(self) -> Tensor:
        return self.data


class Reader:
    """Reads from opened files. `hashing` is a thread that hashes each piece while the next one is read."""

    def __init__(self, files: Mapping[Path, DirectFile], room: Room, phases: Phases, hashing: Executor) -> None:
        self._files, self._room, self._phases, self._hashing = files, room, phases, hashing

    def read(self, spec: TensorSpec, stored: StoredTensor, rounds: bool) -> Waiting:
        """Read a tensor; `rounds`: to bf16.

        Raises:
            ConversionError: its file cannot be read, or became shorter.
        """
        entry = stored.entry
        if not stored.as_it_is:
            return self._made(spec, stored, rounds)
        if rounds and entry.start % torch_dtype(entry.dtype).itemsize == 0:
            return self._rounded(spec, stored)
        digest = hashlib.sha256()
        data, hashed = self._whole(stored.pieces[0], digest)

        def wait() -> SourceTensor:
            for part in hashed:
                part.result()
            return self._tensor(spec, entry, data.view(entry.shape), digest, rounds)

        return wait

    def _made(self, spec: TensorSpec, stored: StoredTensor, rounds: bool) -> Waiting:
        """A tensor that a view makes of its pieces. Its hash is of what is made, as `verify` takes it."""
        pieces = [self._whole(piece) for piece in stored.pieces]
        assert stored.view is not None
        read = [
            _InMemory(piece.file, piece.entry, data) for piece, (data, _) in zip(stored.pieces, pieces, strict=True)
        ]
        data = stored.view.made(read, stored.entry).contiguous()
        digest = hashlib.sha256(tensor_bytes(data))
        return lambda: self._tensor(spec, stored.entry, data, digest, rounds)

    def _rounded(self, spec: TensorSpec, stored: StoredTensor) -> Waiting:
        """A tensor that is rounded piece by piece, so that no more memory is needed than for the result."""
        entry, digest, bf16 = stored.entry, hashlib.sha256(), torch_dtype("BF16")
        dtype = torch_dtype(entry.dtype)
        data = self._room.empty(entry.shape, bf16)
        flat, before = data.view(-1), entry.start % PAGE_BYTES
        rooms = [self._room.empty((READ_BYTES,), torch_dtype("U8")) for _ in range(2)]
        done: list[Future[Norms]] = []

        def use(part: Tensor, first: int) -> Norms:
            with self._phases(SOURCE_HASH):
                digest.update(tensor_bytes(part))
            values = part.view(dtype)
            return round_into(flat[first : first + values.numel()], values)

        size = before + entry.nbytes
        for k, start in enumerate(range(0, size, READ_BYTES)):
            if k >= len(rooms):
                done[k - len(rooms)].result()
            room, end = rooms[k % len(rooms)], min(READ_BYTES, size - start)
            self._read_into(stored.pieces[0], entry.start - before + start, tensor_bytes(room), end)
            own = max(0, before - start)
            done.append(self._hashing.submit(use, room[own:end], (start + own - before) // dtype.itemsize))

        def wait() -> SourceTensor:
            loss = relative([part.result() for part in done])
            return SourceTensor(spec, entry.dtype, entry.shape, data, digest.hexdigest(), self._room.empty, loss)

        return wait

    def _whole(self, piece: Piece, digest: Hash | None = None) -> tuple[Tensor, list[Future[None]]]:
        """A piece as it is stored, and the hashing of it."""
        entry, dtype = piece.entry, torch_dtype(piece.entry.dtype)
        before = entry.start % PAGE_BYTES  # so that parts begin with a page, in the file as in memory
        size = before + entry.nbytes
        space = self._room.empty((-(-size // PAGE_BYTES) * PAGE_BYTES,), torch_dtype("U8"))
        view, hashed = tensor_bytes(space), []
        for start in range(0, size, READ_BYTES):
            end = min(start + READ_BYTES, size)
            self._read_into(piece, entry.start - before + start, view[start : start + READ_BYTES], end - start)
            own = view[max(start, before) : end]
            if digest is not None and size < SMALL_BYTES:
                self._hash(digest, own)
            elif digest is not None:
                hashed.append(self._hashing.submit(self._hash, digest, own))
        data = space[before:size]
        if before % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(entry.shape), hashed

    def _tensor(self, spec: TensorSpec, entry: TensorEntry, data: Tensor, digest: Hash, rounds: bool) -> SourceTensor:
        loss = None
        if rounds:
            wide, data = data, self._room.empty(entry.shape, torch_dtype("BF16"))
            loss = relative([round_into(data, wide)])
        return SourceTensor(spec, entry.dtype, entry.shape, data, digest.hexdigest(), self._room.empty, loss)

    def _hash(self, digest: Hash, part: memoryview) -> None:
        with self._phases(SOURCE_HASH):
            digest.update(part)

    def _read_into(self, piece: Piece, offset: int, view: memoryview, least: int) -> None:
        """Fill `view` from a tensor's file, or as much of it as the file has, but `least` bytes."""
        file, name = self._files[piece.file.path], piece.entry.name
        try:
            with self._phases(READ):
                count = file.read_into(view, offset)
        except OSError as error:
            raise ConversionError(f"{file.path}: tensor {name} cannot be read ({error.strerror or error})") from error
        if count < least:
            raise ConversionError(f"{file.path}: became shorter while tensor {name} was read; restore the file")
