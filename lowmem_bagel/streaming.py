"""Weights flowing through device slots.

Each streamed unit, the blob of one (layer, expert), is copied into one of a few device buffers by a copy stream while
earlier units compute. Two events a slot keep order: `ready` (the copy is done) and `free` (the work that read the slot
is done). With page-locked sources nothing in the loop allocates or waits on the host; other sources go through small
page-locked staging buffers that a worker thread fills.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .model.blob import Layout
from .model.decoder import Layer
from .plan import Unit
from .ring import SlotRing
from .tensors import EXPERTS, Expert

STAGING_BYTES = 32 << 20
STAGING_BUFFERS = 4


class Copy(Protocol):
    """A copy under way."""

    def queued(self) -> None:
        """Return when all of it is queued on the copy stream, so that an event recorded there covers it.

        Raises:
            CheckpointError: the bytes could not be read.
        """
        ...


class UnitSource(Protocol):
    """Where the bytes of streamed units wait."""

    def start(self, unit: Unit, slot: Tensor, stream: torch.cuda.Stream, ready: torch.cuda.Event) -> Copy:
        """Copy a unit into the slot on the stream and record `ready` there behind it."""
        ...

    def close(self) -> None: ...


class _Queued:
    def queued(self) -> None:
        pass


class PinnedSource:
    """Page-locked blobs: a copy is queued at once."""

    def __init__(self, blobs: Mapping[Unit, Tensor]) -> None:
        self.blobs = dict(blobs)

    def start(self, unit: Unit, slot: Tensor, stream: torch.cuda.Stream, ready: torch.cuda.Event) -> Copy:
        blob = self.blobs[unit]
        with torch.cuda.stream(stream):
            slot[: blob.numel()].copy_(blob, non_blocking=True)
            ready.record(stream)
        return _Queued()

    def close(self) -> None:
        self.blobs.clear()


class Reader(Protocol):
    """Reads part of a unit's bytes into page-locked memory; called on the worker thread."""

    def __call__(self, unit: Unit, offset: int, into: Tensor) -> None: ...

    def nbytes(self, unit: Unit) -> int: ...

    def close(self) -> None: ...


class _Staged:
    """A copy that a worker thread makes."""

    def __init__(self, unit: Unit, slot: Tensor, stream: torch.cuda.Stream, ready: torch.cuda.Event) -> None:
        self.unit, self.slot, self.stream, self.ready = unit, slot, stream, ready
        self.done = threading.Event()
        self.error: BaseException | None = None

    def queued(self) -> None:
        self.done.wait()
        if self.error is not None:
            raise self.error


class StagedSource:
    """Blobs in plain RAM or on disk, read by a worker thread through page-locked staging buffers."""

    def __init__(self, read: Reader, device: torch.device) -> None:
        from .host_memory import staging_buffer

        self._read, self._device = read, device
        buffers = [staging_buffer(STAGING_BYTES) for _ in range(STAGING_BUFFERS)]
        self._staging = [buffer for buffer, _ in buffers]
        self.not_pinned = next((why for _, why in buffers if why), None)
        """Why a staging buffer is plain memory; None where all are page-locked."""
        self._copied = [torch.cuda.Event() for _ in self._staging]
        self._next = 0
        self._work: queue.SimpleQueue[_Staged | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._run, name="weight staging", daemon=True)
        self._worker.start()

    def start(self, unit: Unit, slot: Tensor, stream: torch.cuda.Stream, ready: torch.cuda.Event) -> Copy:
        copy = _Staged(unit, slot, stream, ready)
        self._work.put(copy)
        return copy

    def close(self) -> None:
        self._work.put(None)
        self._worker.join()
        for event in self._copied:
            event.synchronize()
        self._read.close()

    def _run(self) -> None:
        torch.cuda.set_device(self._device)
        while (copy := self._work.get()) is not None:
            try:
                self._copy(copy)
            except BaseException as error:  # handed to the thread that waits for the copy
                copy.error = error
            copy.done.set()

    def _copy(self, copy: _Staged) -> None:
        total = self._read.nbytes(copy.unit)
        for offset in range(0, total, STAGING_BYTES):
            size = min(STAGING_BYTES, total - offset)
            index, self._next = self._next, (self._next + 1) % len(self._staging)
            self._copied[index].synchronize()
            staged = self._staging[index][:size]
            self._read(copy.unit, offset, staged)
            with torch.cuda.stream(copy.stream):
                copy.slot[offset : offset + size].copy_(staged, non_blocking=True)
                self._copied[index].record(copy.stream)
        copy.ready.record(copy.stream)


class RamReader:
    """Blobs in plain memory."""

    def __init__(self, blobs: Mapping[Unit, Tensor]) -> None:
        self.blobs = dict(blobs)

    def __call__(self, unit: Unit, offset: int, into: Tensor) -> None:
        into.copy_(self.blobs[unit][offset : offset + into.numel()])

    def nbytes(self, unit: Unit) -> int:
        return self.blobs[unit].numel()

    def close(self) -> None:
        self.blobs.clear()


class _Slot:
    """A device buffer, and the events that order its filling and its use."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.ready, self.free = torch.cuda.Event(), torch.cuda.Event()
        self.copy: Copy = _Queued()


class StreamedLayers:
    """A source of layers some of whose units stream through slots; see `model.decoder.LayerSource`.

    Copies run ahead of the computation as far as there are slots, past the end of a pass into the next one, which is
    assumed to use the same experts.
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
        self._ring = SlotRing(slots, self._start_copy)
        self._experts: frozenset[Expert] = frozenset()
        self._sequence: list[Unit] = []

    @property
    def slot_bytes(self) -> int:
        return sum(slot.buffer.numel() for slot in self._slots)

    def begin(self, experts: Collection[Expert]) -> None:
        if self._experts != frozenset(experts):
            self._experts = frozenset(experts)
            self._sequence = [
                (layer, expert)
                for layer in range(len(self.layers))
                for expert in EXPERTS
                if expert in experts and (layer, expert) in self.layouts
            ]
        self._free(self._ring.begin(self._sequence))
        self._ring.fill()

    def acquire(self, layer: int) -> Layer:
        experts = self.layers[layer]
        for expert, module in experts.items():
            unit = (layer, expert)
            if unit not in self.layouts or expert not in self._experts:
                continue
            slot = self._slots[self._ring.acquire(unit)]
            slot.copy.queued()
            torch.cuda.current_stream(self.device).wait_event(slot.ready)
            self.layouts[unit].bind(module, slot.buffer)
        return experts

    def release(self, layer: int) -> None:
        self._free(self._ring.release())
        self._ring.fill()

    def close(self) -> None:
        """Wait for copies under way and drop the slots and the source."""
        self._stream.synchronize()
        self.source.close()
        self._slots.clear()

    def _free(self, slots: Sequence[int]) -> None:
        """All work that reads these slots has been queued."""
        for index in slots:
            self._slots[index].free.record(torch.cuda.current_stream(self.device))

    def _start_copy(self, unit: Unit, index: int) -> None:
        slot = self._slots[index]
        self._stream.wait_event(slot.free)
        slot.copy = self.source.start(unit, slot.buffer, self._stream, slot.ready)
