"""Which units are on the device and which stream, and how one becomes the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .disk_reader import DiskReader, Segment
from .host_memory import PinningRefused, pinned_buffer
from .model.blob import Layout
from .model.decoder import Decoder, Layer, ResidentLayers
from .plan import Place, Unit
from .streaming import PinnedSource, RamReader, StagedSource, StreamedLayers, UnitSource


@dataclass
class _Held:
    """A unit's layout and the blob that holds its weights: on the device if resident, on the host if streamed.

    `segments` say where a streamed unit lies on disk; its blob then only lends addresses and holds nothing.
    """

    layout: Layout
    blob: Tensor
    streamed: bool
    segments: Sequence[Segment] | None = None


class Residency:
    """The blobs of all units of a decoder.

    Args:
        source: where streamed blobs wait; "pinned" falls back to plain memory where the system refuses, and
            `note` is told why.
    """

    def __init__(
        self, decoder: Decoder, layers: Sequence[Layer], device: torch.device, source: Place, slots: int,
        note: Callable[[str, str], None],
    ) -> None:  # fmt: skip
        self.decoder, self.layers, self.device = decoder, layers, device
        self.place, self.slots, self.note = source, slots, note
        self._held: dict[Unit, _Held] = {}

    def add(
        self,
        unit: Unit,
        streamed: bool,
        fill: Callable[[Layout, Tensor], None],
        on_disk: Callable[[Layout], Sequence[Segment] | None],
    ) -> None:
        """Allocate a unit's blob where it belongs and have it filled; `on_disk` says where its bytes lie in files."""
        layer, expert = unit
        layout = Layout.of(self.layers[layer][expert])
        segments = on_disk(layout) if streamed and self.place == "disk" else None
        if segments is not None:
            untouched = torch.empty(layout.nbytes, dtype=torch.uint8)
            layout.bind(self.layers[layer][expert], untouched)
            self._held[unit] = _Held(layout, untouched, True, segments)
            return
        if streamed and self.place == "disk":
            self.note("disk", "weights are not stored as they are used; streaming from RAM")
            self.place = "pageable"
        if streamed:
            blob = self._host_blob(layout.nbytes)
        else:
            blob = torch.empty(layout.nbytes, dtype=torch.uint8, device=self.device)
        fill(layout, blob)
        layout.bind(self.layers[layer][expert], blob)
        self._held[unit] = _Held(layout, blob, streamed)

    @property
    def streamed(self) -> tuple[Unit, ...]:
        return tuple(unit for unit, held in self._held.items() if held.streamed)

    @property
    def resident(self) -> tuple[Unit, ...]:
        return tuple(unit for unit, held in self._held.items() if not held.streamed)

    def start(self) -> None:
        """Give the decoder its source of layers; called again after a change."""
        self._close_source()
        waiting = {unit: held for unit, held in self._held.items() if held.streamed}
        if not waiting:
            self.decoder.source = ResidentLayers(self.layers)
            return
        blobs = {unit: held.blob for unit, held in waiting.items()}
        layouts = {unit: held.layout for unit, held in waiting.items()}
        source: UnitSource
        if all(held.segments is not None for held in waiting.values()):
            segments = {unit: held.segments or () for unit, held in waiting.items()}
            reader = DiskReader(segments, {unit: layout.nbytes for unit, layout in layouts.items()})
            source = StagedSource(reader, self.device)
        elif all(blob.is_pinned() for blob in blobs.values()):
            source = PinnedSource(blobs)
        else:
            source = StagedSource(RamReader(blobs), self.device)
        if isinstance(source, StagedSource) and source.not_pinned:
            self.note("staging buffers", f"plain memory ({source.not_pinned})")
        self.decoder.source = StreamedLayers(self.layers, layouts, source, self.slots, self.device)

    def demote(self, nbytes: int) -> int:
        """Turn resident units into streamed ones until at least `nbytes` are free; returns the bytes freed.

        The units are taken evenly from all layers, so that copies stay hidden behind arithmetic.
        """
        self.slots = max(self.slots, 2)
        resident = self.resident
        had_slots = bool(self.streamed)
        largest = max((held.blob.numel() for held in self._held.values()), default=0)
        wanted = nbytes + (0 if had_slots else self.slots * largest)
        order = [unit for offset in range(4) for unit in resident[offset::4]]
        freed = 0
        self._close_source()
        for unit in order:
            if freed >= wanted:
                break
            held = self._held[unit]
            host = self._host_blob(held.layout.nbytes)
            host.copy_(held.blob)
            freed += held.blob.numel()
            layer, expert = unit
            held.layout.bind(self.layers[layer][expert], host)
            held.blob, held.streamed = host, True
        torch.cuda.empty_cache()
        self.start()
        return freed - (0 if had_slots else self.slots * largest) if freed else 0

    def close(self) -> None:
        """Drop everything, streams first."""
        self._close_source()
        self.decoder.source = ResidentLayers(self.layers)
        self._held.clear()

    def _close_source(self) -> None:
        if isinstance(self.decoder.source, StreamedLayers):
            self.decoder.source.close()

    def _host_blob(self, nbytes: int) -> Tensor:
        if self.place in ("pinned", "device") and self.device.type == "cuda":
            try:
                return pinned_buffer(nbytes)
            except PinningRefused as refusal:
                self.note("pinning", f"refused ({refusal}); streaming through small staging buffers")
                self.place = "pageable"
        return torch.empty(nbytes, dtype=torch.uint8)
