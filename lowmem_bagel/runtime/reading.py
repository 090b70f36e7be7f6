"""Weights read by several threads at once: straight from the files into the memory that they wait in, or through small
page-locked buffers into a card's.

One thread copies from a mapped file at the speed of page faults, a fraction of what a disk or the page cache gives.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from ..checkpoint.safetensors_file import TensorFile, torch_dtype
from ..checkpoint.stored import StoredTensor
from ..errors import CheckpointError
from ..ops.device import on
from .streaming.pinned import staging_buffer

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

READERS = 8
"""Threads, at most: a disk wants several requests at a time, and memory more than one core. Of a small model one does
it sooner, because what takes time is Python, in which one thread at a time runs."""
PIECE = 4 << 20
"""Bytes of a page-locked buffer, of which each thread has two: 64 MiB in all."""
CHUNK = 64 << 20
"""Bytes that are read in one call; between calls a thread sees that it is to stop."""
TOLD_EVERY = 0.1
"""Seconds between calls of the progress function."""


class _Stopped(Exception):
    """Ends a thread whose work nobody waits for any more."""


class Readers:
    """Threads that fill memory with weights. What they raise is raised where their result is asked for.

    Leaving it waits for the threads, which stop at once where an exception leaves it. `progress` is called on the
    thread that waits for results.
    """

    def __init__(self, device: torch.device, total: int, progress: Progress | None = None) -> None:
        self.device, self.total, self.progress = device, total, progress
        self.read_bytes = 0
        """What came straight from files."""
        self._done = 0
        self._told = -1
        self._lock = threading.Lock()
        self._stopped = False
        self._own = threading.local()
        self._files: list[io.FileIO] = []
        self._pool = ThreadPoolExecutor(min(READERS, 1 + total // CHUNK), thread_name_prefix="lowmem-bagel-reader")

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = error is not None
        self._pool.shutdown(cancel_futures=self._stopped)
        for file in self._files:
            file.close()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have it done by a thread, with the device as its current one."""
        return self._pool.submit(self._run, work)

    def result(self, future: Future[T]) -> T:
        """What the work gave, or raised."""
        while not future.done():
            wait([future], TOLD_EVERY)
            self._tell()
        self._tell()
        return future.result()

    def copy(self, target: Tensor, value: Tensor, stored: StoredTensor | None) -> None:
        """Fill `target`, contiguous, with `value`, which is of its shape; converts between dtypes.

        `stored` says where it lies, if `value` is a view of a file: as used, it is read from there.

        Raises:
            CheckpointError: the file vanished, shrank or cannot be read.
        """
        self._go_on()
        if stored is None or not _lies_there(stored, target.dtype):
            target.copy_(value)
        else:
            self._read_into(stored.file.path, stored.entry.start, _bytes(target))
        with self._lock:
            self._done = min(self._done + value.nbytes, self.total)

    def _run(self, work: Callable[[], T]) -> T:
        with on(self.device):
            self._go_on()
            return work()

    def _go_on(self) -> None:
        if self._stopped:
            raise _Stopped

    def _tell(self) -> None:
        if self.progress is not None and self._done != self._told:
            self._told = self._done
            self.progress(self._told, self.total)

    def _read_into(self, path: Path, offset: int, target: Tensor) -> None:
        if target.device.type == "cpu":
            self._read(path, offset, target)
        else:
            self._send(path, offset, target)

    def _send(self, path: Path, offset: int, target: Tensor) -> None:
        """Read into a card's memory. One buffer is read into while the other's copy runs."""
        slots = self._slots()
        for start in range(0, target.numel(), PIECE):
            buffer, sent = slots[start // PIECE % len(slots)]
            piece = buffer[: min(PIECE, target.numel() - start)]
            sent.synchronize()
            self._read(path, offset + start, piece)
            target[start : start + piece.numel()].copy_(piece, non_blocking=True)
            sent.record(torch.cuda.current_stream(self.device))
        for _, sent in slots:
            sent.synchronize()

    def _slots(self) -> Sequence[tuple[Tensor, torch.cuda.Event]]:
        with suppress(AttributeError):
            return self._own.slots  # type: ignore[no-any-return]
        event: Callable[..., torch.cuda.Event] = torch.cuda.Event
        self._own.slots = [(staging_buffer(PIECE, self.device)[0], event(blocking=True)) for _ in range(2)]
        return self._own.slots  # type: ignore[no-any-return]

    def _read(self, path: Path, offset: int, target: Tensor) -> None:
        view, done = target.numpy().data, 0
        try:
            file = self._file(path)
            file.seek(offset)
            while done < len(view):
                self._go_on()
                count = file.readinto(view[done : done + CHUNK])
                if not count:
                    raise CheckpointError(f"{path}: ends before its weights while they are read; restore the file")
                done += count
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        with self._lock:
            self.read_bytes += done

    def _file(self, path: Path) -> io.FileIO:
        """Each thread its own, since the system reads ahead by file, and a file has one position."""
        files: dict[Path, io.FileIO] = self._own.__dict__.setdefault("files", {})
        if path not in files:
            files[path] = io.FileIO(path)
            with self._lock:
                self._files.append(files[path])
        return files[path]


def _lies_there(stored: StoredTensor, used: torch.dtype) -> bool:
    """Whether its bytes in an ordinary file are those that are used."""
    return stored.as_it_is and isinstance(stored.file, TensorFile) and torch_dtype(stored.entry.dtype) == used


def _bytes(target: Tensor) -> Tensor:
    """uint8 [nbytes], the same memory."""
    assert target.is_contiguous()
    return target.view(-1).view(torch.uint8)
