"""Which units are on the device and which stream, and how one becomes the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint.tensors import EXPERTS
from ..model.decoder import Decoder, Layer, LayerSource, ResidentLayers
from ..model.flat_buffer import Layout
from ..ops.device import empty_cache
from ..planner.plan import NATIVE, Place, Unit
from .streaming.disk import DiskReader, Kept, Segment
from .streaming.layers import (
    BufferedSource,
    MixedReader,
    MixedSource,
    PinnedSource,
    RamReader,
    StreamedLayers,
    UnitSource,
)
from .streaming.pinned import PinningRefused, pinned_buffer, staging_buffer


class MovedLayers(LayerSource, Protocol):
    """A source of layers some of whose units are not always on the device."""

    def close(self) -> None:
        """Let go of their memory; the modules' tensors are bound anew."""
        ...


Mover = Callable[[Sequence[Layer], Collection[Unit], torch.device], MovedLayers]
"""Makes a source whose units wait in plain memory, in place of ours."""

STAGING_BYTES = 32 << 20
STAGING_BUFFERS = 4


@dataclass
class Held:
    """A unit's layout and the flat buffer that holds its weights: on the device if resident, on the host if streamed.

    `segments` say where the unit lies on disk, where it may be read from there; streamed, its buffer then only lends
    addresses and holds nothing.
    """

    layout: Layout
    buffer: Tensor
    streamed: bool
    pinned: bool = False
    """Whether the buffer is page-locked host memory."""
    segments: Sequence[Segment | Kept] | None = None


class UnitBuffers:
    """The flat buffers of all units of a decoder.

    Args:
        source: where buffers wait that are given no other place; "pinned" falls back to plain memory where the system
            refuses, "disk" where a unit is not stored as it is used, and `note` is told why.
        demoted: where units go that leave the device later.
    """

    def __init__(
        self, decoder: Decoder, layers: Sequence[Layer], device: torch.device, source: Place, slots: int,
        note: Callable[[str, str], None], offload: str = NATIVE, demoted: Place | None = None,
    ) -> None:  # fmt: skip
        self.decoder, self.layers, self.device = decoder, layers, device
        self.place, self.slots, self.note = source, slots, note
        self.demoted = source if demoted is None else demoted
        self._mover: Mover | None = named(offload)
        if self._mover is not None:
            self.place = self.demoted = "pageable"  # what it moves waits in plain memory
        self._moved: MovedLayers | None = None
        self._copied_before = 0
        self._held: dict[Unit, Held] = {}

    def made(
        self,
        unit: Unit,
        place: Place,
        fill: Callable[[Layout, Tensor], None],
        on_disk: Callable[[Layout], Sequence[Segment | Kept] | None],
    ) -> Held:
        """Allocate a unit's buffer at its place and have it filled; `on_disk` says where its bytes lie in files.

        Several threads may do so at a time. What they made is then given to `add`.
        """
        layer, expert = unit
        layout = Layout.of(self.layers[layer][expert])
        streamed = place != "device"
        if streamed and self._mover is not None:
            place = self.place
        segments = on_disk(layout) if (place if streamed else self.demoted) == "disk" else None
        pinned = False
        if streamed and segments is not None:
            buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
        else:
            if place == "disk":
                self.note("disk", "some weights are not stored as they are used; they wait in RAM")
            if place == "pinned":
                buffer, pinned = self.host_buffer(layout.nbytes)
            elif streamed:
                buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
            else:
                buffer = self._device_buffer(layout.nbytes)
            fill(layout, buffer)
        return Held(layout, buffer, streamed, pinned, segments)

    def add(self, unit: Unit, held: Held) -> None:
        """Bind a unit's module to what was made for it; in order of the layers."""
        layer, expert = unit
        held.layout.bind(self.layers[layer][expert], held.buffer)
        self._held[unit] = held

    @property
    def streamed(self) -> tuple[Unit, ...]:
        return tuple(unit for unit, held in self._held.items() if held.streamed)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that a pass through all layers with both experts copies."""
        return sum(held.layout.nbytes for held in self._held.values() if held.streamed)

    @property
    def copied_bytes(self) -> int | None:
        """To the device since loading, of streamed units; None where what moves them does not count."""
        now = 0 if self._moved is None else getattr(self._moved, "copied_bytes", None)
        return None if now is None else self._copied_before + now

    @property
    def resident(self) -> tuple[Unit, ...]:
        return tuple(unit for unit, held in self._held.items() if not held.streamed)

    def start(self) -> None:
        """Give the decoder its source of layers; called again after a change."""
        self._close_source()
        layouts = {unit: held.layout for unit, held in self._held.items() if held.streamed}
        if not layouts:
            self.decoder.source = ResidentLayers(self.layers)
        elif self._mover is not None:
            self.decoder.source = self._moved = self._mover(self.layers, layouts, self.device)
        else:
            streamed = StreamedLayers(self.layers, layouts, self._source(), self.slots, self.device)
            self.decoder.source = self._moved = streamed

    def _source(self) -> UnitSource:
        """Each streamed unit from where it waits: page-locked memory, plain memory, or its shards."""
        waiting = {unit: held for unit, held in self._held.items() if held.streamed}
        segments = {unit: held.segments for unit, held in waiting.items() if held.segments is not None}
        pinned = {unit: held.buffer for unit, held in waiting.items() if unit not in segments and held.pinned}
        plain = {unit: held.buffer for unit, held in waiting.items() if unit not in segments and unit not in pinned}
        if len(pinned) == len(waiting):
            return PinnedSource(pinned)
        sizes = {unit: waiting[unit].layout.nbytes for unit in segments}
        reader = MixedReader([(segments, DiskReader(segments, sizes)), (plain, RamReader(plain))])
        buffered = BufferedSource(
            reader, self._staging(max(held.layout.nbytes for held in waiting.values())), self.device
        )
        return MixedSource(PinnedSource(pinned), buffered, self.device) if pinned else buffered

    def _staging(self, largest: int) -> list[Tensor]:
        """Staging buffers, none larger than the largest unit."""
        buffers = []
        for _ in range(STAGING_BUFFERS):
            buffer, why_plain = staging_buffer(min(STAGING_BYTES, largest), self.device)
            if why_plain is not None:
                self.note("staging", f"not page-locked ({why_plain}); copies wait on the host")
            buffers.append(buffer)
        return buffers

    def demote(self, nbytes: int) -> int:
        """Turn resident units into streamed ones until at least `nbytes` are free; returns the bytes freed.

        The units are taken evenly from all layers, so that copies stay hidden behind arithmetic, and gen's first:
        texts need und alone and have little arithmetic to hide copies behind.
        """
        self.slots = max(self.slots, 2)
        resident = self.resident
        had_slots = bool(self.streamed)
        largest = max((held.buffer.numel() for held in self._held.values()), default=0)
        wanted = nbytes + (0 if had_slots else self.slots * largest)
        of_expert = ([unit for unit in resident if unit[1] == expert] for expert in reversed(EXPERTS))
        order = [unit for units in of_expert for offset in range(4) for unit in units[offset::4]]
        freed = 0
        self._close_source()
        for unit in order:
            if freed >= wanted:
                break
            held = self._held[unit]
            if held.segments is None:
                host, held.pinned = self.host_buffer(held.layout.nbytes)
                host.copy_(held.buffer)
            else:
                host = torch.empty(held.layout.nbytes, dtype=torch.uint8)
            freed += held.buffer.numel()
            layer, expert = unit
            held.layout.bind(self.layers[layer][expert], host)
            held.buffer, held.streamed = host, True
        empty_cache()
        self.start()
        return max(0, freed - (0 if had_slots else self.slots * largest))

    def promote(self, nbytes: int) -> int:
        """Turn streamed units that wait in RAM into resident ones, as far as `nbytes` go; returns what was
        taken. und's first, which has little arithmetic to hide copies behind. Units on disk go on streaming."""
        waiting = [unit for unit in self.streamed if self._held[unit].segments is None]
        taken = 0
        self._close_source()
        try:
            for unit in sorted(waiting, key=lambda unit: EXPERTS.index(unit[1])):
                layer, expert = unit
                held = self._held[unit]
                if taken + held.layout.nbytes > nbytes:
                    continue
                buffer = self._device_buffer(held.layout.nbytes)
                buffer.copy_(held.buffer)
                held.layout.bind(self.layers[layer][expert], buffer)
                held.buffer, held.streamed, held.pinned = buffer, False, False
                taken += buffer.numel()
        finally:  # also where another took the memory meanwhile
            self.start()
        return taken

    def close(self) -> None:
        """Drop everything, streams first."""
        self._close_source()
        self._held.clear()
        self.layers = ()
        self.decoder.source = ResidentLayers(self.layers)

    def _close_source(self) -> None:
        """Stop streaming. The modules let go of the slots, whose memory would otherwise live on in them."""
        if self._moved is None:
            return
        self._copied_before += getattr(self._moved, "copied_bytes", 0)
        self._moved.close()
        self._moved = None
        for (layer, expert), held in self._held.items():
            if held.streamed:
                held.layout.bind(self.layers[layer][expert], held.buffer)

    def _device_buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host_buffer(self, nbytes: int) -> tuple[Tensor, bool]:
        """Host memory for weights that wait: uint8 [nbytes], and whether it is page-locked, which it is where the plan
        wants it and the system allows.

        Parts that visit the device for a phase wait in such memory too.
        """
        if self.place in ("pinned", "device") and self.device.type == "cuda":
            try:
                return pinned_buffer(nbytes, self.device), True
            except PinningRefused as refusal:
                self.note("pinning", f"refused ({refusal}); the rest waits in ordinary memory, and copies are slower")
                self.place = "pageable"
        return torch.empty(nbytes, dtype=torch.uint8), False


def named(what: str) -> Any:
    """What a plan names as "module:name", None where that is ours."""
    if what == NATIVE:
        return None
    module, _, name = what.partition(":")
    return getattr(import_module(module), name)
