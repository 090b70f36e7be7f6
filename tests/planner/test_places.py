"""Streamed units that wait in several places: chosen, predicted and carried out."""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import CHECKPOINT
from support.streaming import UNITS, drawn, pipeline
from torch import Tensor

from lowmem_bagel.checkpoint.tensors import EXPERTS
from lowmem_bagel.errors import Cancelled, DoesNotFitError
from lowmem_bagel.hardware.profile import GIB, HardwareProfile
from lowmem_bagel.planner.calibration import MEASURED
from lowmem_bagel.planner.compute import Overrides, compute_configs
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.plan import Residency, Unit
from lowmem_bagel.planner.search import Search
from lowmem_bagel.planner.solve import Limits, Request, make_plan
from lowmem_bagel.runtime import residency as residency_module
from lowmem_bagel.runtime.streaming.layers import Reader
from lowmem_bagel.runtime.streaming.ring import SlotRing

PICTURE = frozenset(EXPERTS)
DRAWING = Request(tasks=("generate",))
PIECE = 32 << 20
BUFFERS = 4


@dataclass
class Clock:
    """Passes over the layers with every copy and every layer at its time, in seconds.

    The host queues work ahead of the card. Page-locked units are copied in the order of their queue; what is on disk is
    read by one thread, piece by piece, through a few staging buffers, and copied in a queue of its own.
    """

    residency: Residency
    nbytes: int
    layers: int
    compute: float
    """Of one layer."""
    copy: float
    """Bytes a second over the bus."""
    read: float
    """Bytes a second from the disk."""

    def passes(self, count: int) -> float:
        """Seconds of the last of `count` passes."""
        ring, places = SlotRing(self.residency.slots), self.residency
        sequence = [(layer, e) for layer in range(self.layers) for e in EXPERTS if (layer, e) in places.streamed]
        self.host = self.device = self.stream = self.buffered = self.worker = 0.0
        self.free, self.ready = [0.0] * places.slots, dict.fromkeys(sequence, 0.0)
        self.jobs: list[tuple[float, Unit, int]] = []
        self.queued: dict[Unit, float] = {}
        self.buffers = [0.0] * BUFFERS
        ends = []
        for _ in range(count):
            ring.begin(sequence)
            ring.fill(self.start)
            for layer in range(self.layers):
                units = [(layer, e) for e in EXPERTS if (layer, e) in places.streamed]
                slots = [ring.acquire(unit) for unit in units]
                while any(job[1] in units for job in self.jobs):
                    self.stage()
                self.host = max([self.host, *(self.queued.get(unit, 0.0) for unit in units)])
                self.device = max([self.device, self.host, *(self.ready[unit] for unit in units)]) + self.compute
                for index in slots:
                    self.free[index] = self.device
                ring.release()
                ring.fill(self.start)
            ends.append(self.device)
        return ends[-1] - ends[-2]

    def start(self, unit: Unit, slot: int) -> None:
        if self.residency.place(unit) == "disk":
            heapq.heappush(self.jobs, (self.host, unit, slot))
            return
        self.stream = max(self.stream, self.free[slot], self.host) + self.nbytes / self.copy
        self.ready[unit] = self.stream

    def stage(self) -> None:
        """The reading thread's next unit, from its first piece to its last."""
        queued, unit, slot = heapq.heappop(self.jobs)
        self.worker = max(self.worker, queued)
        for start in range(0, self.nbytes, PIECE):
            size = min(PIECE, self.nbytes - start)
            self.worker = max(self.worker, self.buffers.pop(0)) + size / self.read
            self.buffered = max(self.buffered, self.free[slot], self.worker) + size / self.copy
            self.buffers.append(self.buffered)
        self.ready[unit], self.queued[unit] = self.buffered, self.worker


def machine(vram: float, ram: float, pcie: float = 25.0, name: str = "RTX 4080") -> HardwareProfile:
    return HardwareProfile.hypothetical(vram, (8, 9), ram, pcie, name=name)


@pytest.mark.parametrize("form", ["source", "dfloat11"])
@pytest.mark.parametrize(("name", "vram", "pcie"), [("RTX 4080", 16, 25), ("RTX 3060", 12, 25), ("RTX 4060", 8, 12.5)])
@pytest.mark.parametrize("ram", [8, 12, 16, 20, 28])
def test_seconds_are_those_of_streaming_played_through(
    form: str, name: str, vram: float, pcie: float, ram: float
) -> None:
    facts, profile = ModelFacts.of_shape(form), machine(vram, ram, pcie, name)
    plan = make_plan(facts, profile, Limits(), DRAWING)
    if not plan.residency.streamed:
        return
    how, _ = next(compute_configs(facts, profile, Overrides()))
    search = Search(facts, profile, Limits(), DRAWING, how, MEASURED)
    rates, tokens = search.machine.copy, search.workloads[0].picture_tokens
    for branches in (1, 2):
        arithmetic = search.latency.forward(tokens, tokens, branches, PICTURE)
        streaming = search.streaming(plan.residency)
        predicted = search.latency.passing(tokens, tokens, branches, PICTURE, streaming)
        clock = Clock(
            plan.residency, max(search.units.values()), 28, arithmetic / 28, rates["pinned"], rates["disk"]
        )  # fmt: skip
        assert 0.9 <= predicted / clock.passes(4) <= 1.3


def test_ram_that_holds_a_part_holds_that_part() -> None:
    """16 GB of RAM and the 20 GB variant on a small card."""
    facts = ModelFacts.of_shape("dfloat11")
    mixed, whole = (make_plan(facts, machine(8, ram, 12.5, "RTX 4060"), Limits(), DRAWING) for ram in (16, 32))
    residency, waiting = mixed.residency, mixed.residency.waiting()
    assert (residency.source, residency.slowest, whole.residency.waiting().keys()) == ("pinned", "disk", {"pinned"})
    sizes = {place: sum(facts.units[u].nbytes(2) for u in units) for place, units in waiting.items()}
    assert 9e9 < sizes["pinned"] < 10e9 and 4e9 < sizes["disk"] < 5e9
    assert {expert for _, expert in residency.disk} == {"gen"}, "texts have little arithmetic to hide reading behind"
    layers = sorted(layer for layer, _ in residency.disk)
    gaps = [b - a for a, b in zip(layers, [*layers[1:], layers[0] + 28], strict=True)]
    assert max(gaps) <= 4 * 28 / len(layers)
    assert f"{len(residency.disk)} units" in mixed.reasons["source"] and "on disk" in mixed.reasons["source"]
    assert "the disk reads" in mixed.reasons["assumptions"]
    assert whole.prediction.seconds <= mixed.prediction.seconds < 1.05 * whole.prediction.seconds


def test_what_cannot_be_locked_waits_in_plain_ram() -> None:
    limited = replace(machine(8, 64), pin_limit=4 * GIB)
    plan = make_plan(ModelFacts.of_shape("dfloat11"), limited, Limits(), DRAWING)
    assert plan.residency.waiting().keys() == {"pinned", "pageable"}
    assert "only 4.29 GB can be page-locked" in plan.reasons["source"]
    none = replace(limited, pin_limit=0)
    assert make_plan(ModelFacts.of_shape("dfloat11"), none, Limits(), DRAWING).residency.source == "pageable"


@pytest.mark.parametrize(
    ("form", "overrides"), [("source", Overrides(dtype="float32")), ("dfloat11", Overrides(backend="cpu"))],
)  # fmt: skip
def test_weights_that_are_not_stored_as_used_are_not_planned_from_disk(form: str, overrides: Overrides) -> None:
    facts, limits = ModelFacts.of_shape(form), Limits(overrides=overrides)
    assert make_plan(facts, machine(16, 96), limits, DRAWING).residency.source == "pinned"
    with pytest.raises(DoesNotFitError, match="convert to"):
        make_plan(facts, machine(16, 12), limits, DRAWING)


@settings(max_examples=40)
@given(st.sampled_from(["source", "dfloat11"]), st.floats(6, 24), st.floats(7, 40), st.floats(0, 40))
def test_every_streamed_unit_waits_in_one_place_that_has_room(form: str, vram: float, ram: float, pin: float) -> None:
    facts, profile = ModelFacts.of_shape(form), replace(machine(vram, ram), pin_limit=int(pin * GIB))
    try:
        residency = make_plan(facts, profile, Limits(), DRAWING).residency
    except DoesNotFitError:
        return
    waiting = residency.waiting()
    assert sorted(unit for units in waiting.values() for unit in units) == list(residency.streamed)
    sizes = {place: sum(facts.units[u].nbytes(2) for u in units) for place, units in waiting.items()}
    room = profile.ram_available * MEASURED.usable_ram - MEASURED.host_bytes
    assert sizes.get("pinned", 0) <= profile.pin_limit
    assert sizes.get("pinned", 0) + sizes.get("pageable", 0) <= room


MIXED = [
    Residency(UNITS, 3, "pinned", (), UNITS[:2], UNITS[3:5]),
    Residency(UNITS, 2, "pinned", (), (), UNITS[1::2]),
    Residency(UNITS[1:], 4, "pageable", (), (), UNITS[2:4]),
]


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory passes for page-locked where it is asked for."""
    monkeypatch.setattr(
        residency_module.UnitBuffers, "host_buffer", lambda self, n: (torch.empty(n, dtype=torch.uint8), True)
    )


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    return drawn(pipeline(CHECKPOINT, Residency()))


@pytest.mark.usefixtures("fake_cuda", "locked")
@pytest.mark.parametrize("residency", MIXED, ids=["three places", "two", "plain and disk"])
def test_units_wait_where_they_are_planned(wanted: Tensor, residency: Residency) -> None:
    pipe = pipeline(CHECKPOINT, residency)
    held = pipe.model.residency._held
    places = {
        unit: "pinned" if h.pinned else "disk" if h.segments is not None else "pageable"
        for unit, h in held.items()
        if h.streamed
    }
    assert places == {unit: residency.place(unit) for unit in residency.streamed}
    assert torch.equal(drawn(pipe), wanted)
    assert torch.equal(drawn(pipe), wanted)
    pipe.close()


@pytest.mark.usefixtures("fake_cuda", "locked")
def test_units_that_leave_the_device_go_where_there_is_room(wanted: Tensor) -> None:
    """RAM is full where a plan reads from disk."""
    pipe = pipeline(CHECKPOINT, Residency(UNITS[:3], 2, "pinned", (), (), UNITS[:1]))
    held = pipe.model.residency._held
    with torch.inference_mode():
        while len(pipe.model.residency.streamed) < len(UNITS):
            pipe.model.residency.demote(1)
        assert all(h.segments is not None for unit, h in held.items() if unit not in UNITS[1:3])
        assert torch.equal(drawn(pipe), wanted)


@pytest.mark.usefixtures("fake_cuda", "locked")
def test_copies_through_staging_buffers_have_a_stream_of_their_own() -> None:
    """They would wait behind copies for later layers."""
    pipe = pipeline(CHECKPOINT, MIXED[1])
    streams: dict[Unit, object] = {}
    layers = pipe.model.bagel.decoder.source
    for source in (layers.source._pinned, layers.source._buffered):
        start = source.start

        def watched(unit: Unit, slot: Tensor, stream: object, *events: object, start=start) -> object:
            streams[unit] = stream
            return start(unit, slot, stream, *events)

        source.start = watched
    drawn(pipe)
    of_disk = {id(streams[unit]) for unit in MIXED[1].disk}
    of_ram = {id(stream) for unit, stream in streams.items() if unit not in MIXED[1].disk}
    assert len(of_disk) == len(of_ram) == 1 and of_disk != of_ram


@pytest.mark.usefixtures("fake_cuda", "locked")
@pytest.mark.parametrize("residency", MIXED[:2], ids=["three places", "two"])
def test_a_copy_that_nobody_waits_for_any_more_spoils_no_slot(residency: Residency) -> None:
    """Copies run ahead into a pass that may never come: the next one takes their slots for units from elsewhere."""
    pipes = [pipeline(CHECKPOINT, held) for held in (Residency(), residency)]
    answer = pipes[0].ask("what is this?", max_new_tokens=6).token_ids
    buffered = pipes[1].model.bagel.decoder.source.source._buffered
    buffered._read = Slow(buffered._read)
    for _ in range(3):
        with pytest.raises(Cancelled):
            pipes[1].generate("a red circle", callback=lambda _: False, height=32, width=48, num_timesteps=5, seed=3)
        assert pipes[1].ask("what is this?", max_new_tokens=6).token_ids == answer


class Slow:
    """A reader whose disk takes its time."""

    def __init__(self, read: Reader) -> None:
        self.read = read
        self.nbytes, self.close = read.nbytes, read.close

    def __call__(self, unit: Unit, offset: int, into: Tensor) -> None:
        time.sleep(0.004)
        self.read(unit, offset, into)
