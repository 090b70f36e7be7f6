"""Weights flowing through device slots.

Each streamed unit, the weights of one (layer, expert), is copied into one of a few device buffers by a copy stream
while earlier units compute. Two events a slot keep order: `ready` (the copy is done) and `free` (the work that read the
slot is done). With page-locked sources nothing in the loop allocates or waits on the host; other sources go through
small page-locked staging buffers that a worker thread fills.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ...checkpoint.tensors import EXPERTS, Expert
from ...model.decoder import Layer
from ...model.flat_buffer import Layout
from ...ops.device import on
from ...planner.plan import Unit
from .ring import SlotRing


class Copy(Protocol):
    """A copy under way."""

    def queued(self) -> None:
        """Return when all of it is queued on the copy stream, so that an event recorded there covers it.

        Raises:
            CheckpointError: the bytes could not be read.
        """
        ...

    def settled(self) -> None:
        """Return when nothing more of it will be queued, whether it could be read or not."""
        ...


class UnitSource(Protocol):
    """Where the bytes of streamed units wait."""

    def start(
        self, unit: Unit, slot: Tensor, stream: torch.cuda.Stream, free: torch.cuda.Event, ready: torch.cuda.Event
    ) -> Copy:
        """Copy a unit into the slot on the stream, after `free`, and record `ready` there behind it."""
        ...

    def close(self) -> None:
        """Stop. No copy may be started afterwards."""
        ...


class _Queued:
    def queued(self) -> None:
        pass

    def settled(self) -> None:
        pass


class PinnedSource:
    """Page-locked units: a copy is queued at once."""

    def __init__(self, buffers: Mapping[Unit, Tensor]) -> None:
        self.buffers = dict(buffers)

    def start(
        self, unit: Unit, slot: Tensor, stream: torch.cuda.Stream, free: torch.cuda.Event, ready: torch.cuda.Event
    ) -> Copy:
        buffer = self.buffers[unit]
        stream.wait_event(free)
        with torch.cuda.stream(stream):
            slot[: buffer.numel()].copy_(buffer, non_blocking=True)
            ready.record(stream)
        return _Queued()

    def close(self) -> None:
        self.buffers.clear()


class Reader(Protocol):
    """Reads part of a unit's bytes into host memory; called on the worker thread."""

    def __call__(self, unit: Unit, offset: int, into: Tensor) -> None: ...

    def nbytes(self, unit: Unit) -> int: ...

    def close(self) -> None: ...


class _BufferedCopy:
    """A copy that a worker thread makes."""

    def __init__(
        self, unit: Unit, slot: Tensor, stream: torch.cuda.Stream, free: torch.cuda.Event, ready: torch.cuda.Event
    ) -> None:
        self.unit, self.slot, self.stream, self.free, self.ready = unit, slot, stream, free, ready
        self.done = threading.Event()
        self.error: BaseException | None = None

    def queued(self) -> None:
        self.done.wait()
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback refers to this frame: together they would keep the slot alive

    def settled(self) -> None:
        self.done.wait()


class BufferedSource:
    """Units in plain RAM or on disk, read by a worker thread through small staging buffers.

    Args:
        staging: uint8 buffers in host memory, of one size; page-locked ones copy faster and without waiting.
    """

    def __init__(self, read: Reader, staging: Sequence[Tensor], device: torch.device) -> None:
        self._read, self._staging, self._device = read, staging, device
        # Blocking: a worker that waits for a copy must not take a core from the thread that computes.
        self._copied = [torch.cuda.Event(blocking=True) for _ in staging]
        self._next = 0
        self._work: queue.SimpleQueue[_BufferedCopy | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._run, name="weight staging", daemon=True)
        self._worker.start()

    def start(
        self, unit: Unit, slot: Tensor, stream: torch.cuda.Stream, free: torch.cuda.Event, ready: torch.cuda.Event
    ) -> Copy:
        copy = _BufferedCopy(unit, slot, stream, free, ready)
        self._work.put(copy)
        return copy

    def close(self) -> None:
        self._work.put(None)
        self._worker.join()
        for event in self._copied:
            event.synchronize()
        self._read.close()

    # Copying into tensors that a request has made needs inference mode, which each thread enters for itself.
    @torch.inference_mode()
    def _run(self) -> None:
        with on(self._device):
            while (copy := self._work.get()) is not None:
                try:
                    with torch.cuda.stream(copy.stream):
                        self._copy(copy)
                except BaseException as error:  # handed to the thread that waits for the copy
                    copy.error = error
                copy.done.set()

    def _copy(self, copy: _BufferedCopy) -> None:
        try:
            self._copy_pieces(copy)
        finally:
            copy.ready.record(copy.stream)  # behind what was queued, though it be not all

    def _copy_pieces(self, copy: _BufferedCopy) -> None:
        total, size = self._read.nbytes(copy.unit), self._staging[0].numel()
        # Waiting is queued here, not by `start`: it would hold up the copies that this thread has yet to queue.
        copy.stream.wait_event(copy.free)
        for offset in range(0, total, size):
            index, self._next = self._next, (self._next + 1) % len(self._staging)
            self._copied[index].synchronize()
            piece = self._staging[index][: min(size, total - offset)]
            self._read(copy.unit, offset, piece)
            copy.slot[offset : offset + piece.numel()].copy_(piece, non_blocking=True)
            self._copied[index].record(copy.stream)


class MixedSource:
    """Page-locked units as far as there are any, the others through staging buffers.

    The others have a copy stream of their own. On the other one they would end up behind copies for later layers,
    which are queued at once and wait for slots that earlier layers still use.
    """

    def __init__(self, pinned: PinnedSource, buffered: BufferedSource, device: torch.device) -> None:
        self._pinned, self._buffered = pinned, buffered
        self._stream = torch.cuda.Stream(device)

    def start(
        self, unit: Unit, slot: Tensor, stream: torch.cuda.Stream, free: torch.cuda.Event, ready: torch.cuda.Event
    ) -> Copy:
        if unit in self._pinned.buffers:
            return self._pinned.start(unit, slot, stream, free, ready)
        return self._buffered.start(unit, slot, self._stream, free, ready)

    def close(self) -> None:
        self._buffered.close()
        self._stream.synchronize()
        self._pinned.close()


class RamReader:
    """Units in plain memory."""

    def __init__(self, buffers: Mapping[Unit, Tensor]) -> None:
        self.buffers = dict(buffers)

    def __call__(self, unit: Unit, offset: int, into: Tensor) -> None:
        into.copy_(self.buffers[unit][offset : offset + into.numel()])

    def nbytes(self, unit: Unit) -> int:
        return self.buffers[unit].numel()

    def close(self) -> None:
        self.buffers.clear()


class MixedReader:
    """Units that wait in different places: each is read by the first reader that is said to have it."""

    def __init__(self, readers: Sequence[tuple[Collection[Unit], Reader]]) -> None:
        self._readers = [reader for _, reader in readers]
        self._of = {unit: reader for units, reader in reversed(readers) for unit in units}

    def __call__(self, unit: Unit, offset: int, into: Tensor) -> None:
        self._of[unit](unit, offset, into)

    def nbytes(self, unit: Unit) -> int:
        return self._of[unit].nbytes(unit)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


class _Slot:
    """A device buffer, and the events that order its filling and its use."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.ready, self.free = torch.cuda.Event(), torch.cuda.Event()
        # The allocator hands out memory that work queued earlier on this stream may still read.
        self.free.record(torch.cuda.current_stream(device))
        self.copy: Copy = _Queued()


class StreamedLayers:
    """A source of layers some of whose units stream through slots; see `model.decoder.LayerSource`.

    Copies run ahead of the computation as far as there are slots, past the end of a pass into the next one, which is
    assumed to use the same experts. Dropping the object stops its source as `close` does.

    Attributes:
        copied_bytes: to the device, of copies begun so far.
    """

    def __init__(
        self, layers: Sequence[Layer], layouts: Mapping[Unit, Layout], source: UnitSource, slots: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        assert slots >= 2 and layouts
        self.layers, self.layouts, self.source, self.device = layers, layouts, source, device
        largest = max(layout.nbytes for layout in layouts.values())
        self._slots = [_Slot(largest, device) for _ in range(slots)]
        self._stream = torch.cuda.Stream(device)
        self._ring = SlotRing(slots)
        self._experts: frozenset[Expert] = frozenset()
        self._sequence: list[Unit] = []
        self.copied_bytes = 0
        self._finish = weakref.finalize(self, _finish, self._stream, source, self._slots, device)

    def begin(self, experts: Collection[Expert]) -> None:
        if self._experts != frozenset(experts):
            self._experts = frozenset(experts)
            self._sequence = [
                (layer, expert)
                for layer in range(len(self.layers))
                for expert in EXPERTS
                if expert in experts and (layer, expert) in self.layouts
            ]
        self._abandon(self._ring.begin(self._sequence))
        self._ring.fill(self._start_copy)

    def acquire(self, layer: int) -> Layer:
        experts = self.layers[layer]
        for expert, module in experts.items():
            unit = (layer, expert)
            if unit not in self.layouts or expert not in self._experts:
                continue
            slot = self._slots[self._ring.acquire(unit)]
            try:
                slot.copy.queued()
            except BaseException:
                self._abandon(self._ring.forget())  # the next pass must not take what failed for copied
                raise
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
            self.layouts[unit].bind(module, slot.buffer)
        return experts

    def release(self, layer: int) -> None:
        self._free(self._ring.release())
        self._ring.fill(self._start_copy)

    def close(self) -> None:
        """Wait for copies under way, then drop the slots and the source. Modules stay bound to their last slot."""
        self._finish()

    def _free(self, slots: Sequence[int]) -> None:
        """All work that reads these slots has been queued."""
        for index in slots:
            self._slots[index].free.record(torch.cuda.current_stream(self.device))

    def _abandon(self, slots: Sequence[int]) -> None:
        """Free slots whose copies nobody waits for: what is copied there next must come behind them, from anywhere."""
        for index in slots:
            self._slots[index].copy.settled()
            torch.cuda.current_stream(self.device).wait_event(self._slots[index].ready)
        self._free(slots)

    def _start_copy(self, unit: Unit, index: int) -> None:
        slot = self._slots[index]
        slot.copy = self.source.start(unit, slot.buffer, self._stream, slot.free, slot.ready)
        self.copied_bytes += self.layouts[unit].nbytes


def _finish(stream: torch.cuda.Stream, source: UnitSource, slots: list[_Slot], device: torch.device) -> None:
    """Neither side's memory may go before the last copy is done: nobody else knows of the copy stream.

    Closing a source lets go of page-locked memory, and may wait for a worker that queues copies until then.
    """
    with on(device):  # the collector may come along on any thread
        stream.synchronize()
        source.close()
        stream.synchronize()
        slots.clear()
