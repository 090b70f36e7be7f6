"""Streaming without a GPU: real weights through real slots, with streams and events on threads of this process.

A streamed decoder must give the resident one's bits, whatever is streamed, from wherever, in passes of any kind.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lowmem_bagel.benchmarks.baselines.accelerate import AccelerateLayers
from support.paths import CHECKPOINT
from support.streaming import ACCELERATE, DRAWING, PREFETCHED, UNITS, Event, Stream, drawn, pipeline
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import Cancelled, CheckpointError, SettingError
from lowmem_bagel.model.flat_buffer import Layout
from lowmem_bagel.planner.plan import Residency, Unit
from lowmem_bagel.runtime import residency as residency_module
from lowmem_bagel.runtime import staging
from lowmem_bagel.runtime.staging import StagedPart
from lowmem_bagel.runtime.streaming import layers as layers_module
from lowmem_bagel.runtime.streaming.layers import StreamedLayers
from lowmem_bagel.runtime.streaming.pinned import PinningRefused, staging_buffer


@pytest.fixture(scope="module")
def int8(variant_of: Callable[[str], Path]) -> Path:
    return variant_of("int8")


@pytest.fixture(scope="module")
def resident(int8: Path) -> dict[str, BagelPipeline]:
    return {
        "source": pipeline(CHECKPOINT, Residency()),
        "float32": pipeline(CHECKPOINT, Residency(), "float32"),
        "int8": pipeline(int8, Residency()),
    }


@pytest.fixture(scope="module")
def wanted(resident: dict[str, BagelPipeline]) -> dict[str, Tensor]:
    return {name: drawn(pipe) for name, pipe in resident.items()}


@pytest.fixture(scope="module")
def answers(resident: dict[str, BagelPipeline]) -> dict[str, list[int]]:
    return {name: answered(pipe) for name, pipe in resident.items()}


def answered(pipe: BagelPipeline) -> list[int]:
    """A request whose passes use und alone."""
    return pipe.ask("what is this?", max_new_tokens=4).token_ids


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("streamed", [UNITS, UNITS[1::2], UNITS[2:3]], ids=["all", "gen", "one"])
@pytest.mark.parametrize("source", ["pageable", "disk"])
@pytest.mark.parametrize("format", ["source", "int8"])
def test_streamed_equals_resident(
    int8: Path,
    wanted: dict[str, Tensor],
    answers: dict[str, list[int]],
    format: str,
    source: str,
    streamed: tuple[Unit, ...],
) -> None:
    pipe = pipeline(int8 if format == "int8" else CHECKPOINT, Residency(streamed, 3, source))
    assert pipe.model.residency.streamed == streamed
    assert torch.equal(drawn(pipe), wanted[format])
    assert answered(pipe) == answers[format]
    assert torch.equal(drawn(pipe), wanted[format]), "after passes of und alone"
    pipe.close()


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("mode", ["together", "turn"])
def test_frames_that_stream_are_the_resident_ones(small_pictures: BagelPipeline, mode: str) -> None:
    asked = {"height": 32, "width": 32, "seed": 3, "num_timesteps": 3, "frames": 2, "frame_mode": mode}
    asked |= {"turns": ["then"]} if mode == "turn" else {}
    found = []
    for residency in (Residency(), Residency(UNITS, 3, "pageable", disk=UNITS[::3])):
        pipe = pipeline(small_pictures.model.folder.path, residency)
        found.append(pipe.run(["a red circle"], **asked).latent)
        pipe.close()
    assert torch.equal(*found)


@pytest.mark.usefixtures("fake_cuda")
def test_passes_that_end_after_the_first_layer_or_do_not_begin() -> None:
    resident = pipeline(CHECKPOINT, Residency())
    streamed = [pipeline(CHECKPOINT, Residency(UNITS, slots, "pageable")) for slots in (2, 3, 5)]
    for cache in ("first-block", "velocity-3"):
        settings = DRAWING | {"num_timesteps": 12, "step_cache": cache, "step_cache_threshold": 0.05}
        wanted = resident.generate("a red circle", **settings)
        assert wanted.settings["evaluations_computed"] < wanted.settings["evaluations"]
        for pipe in streamed:
            slots = pipe.model.residency.slots
            assert torch.equal(pipe.generate("a red circle", **settings).latent, wanted.latent), (cache, slots)


@pytest.mark.usefixtures("fake_cuda")
def test_weights_that_are_not_stored_as_used_wait_in_ram(wanted: dict[str, Tensor]) -> None:
    pipe = pipeline(CHECKPOINT, Residency(UNITS, 2, "disk"), "float32")
    assert "not stored as they are used" in pipe.model.plan.reasons["disk"]
    assert torch.equal(drawn(pipe), wanted["float32"])


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("before", [Residency(), Residency(UNITS[:2], 2, "pageable"), Residency(UNITS[1:4], 2, "disk")])
def test_demotion_keeps_the_picture(wanted: dict[str, Tensor], before: Residency) -> None:
    """Made inside a request, as the pipeline does: the tensors belong to its inference mode, the worker has its own."""
    pipe = pipeline(CHECKPOINT, before)
    largest = max(held.layout.nbytes for held in pipe.model.residency._held.values())
    with torch.inference_mode():
        while (count := len(pipe.model.residency.streamed)) < len(UNITS):
            pipe.model.residency.demote(largest)
            assert len(pipe.model.residency.streamed) > count
            assert torch.equal(drawn(pipe), wanted["source"])
        assert pipe.model.residency.demote(1) == 0


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("before", [Residency(), Residency(UNITS[:2], 2, "pageable")])
def test_promotion_keeps_the_picture(wanted: dict[str, Tensor], before: Residency) -> None:
    """Units come back one by one, und's first, and what was demoted with them; the last take the slots' place."""
    pipe = pipeline(CHECKPOINT, before)
    residency = pipe.model.residency
    sizes = sorted(held.layout.nbytes for held in residency._held.values())
    with torch.inference_mode():
        residency.demote(10**9)
        assert set(residency.streamed) == set(UNITS)
        assert residency.promote(sizes[0] - 1) == 0
        while residency.streamed:
            count = len(residency.streamed)
            assert sizes[0] <= residency.promote(sizes[-1]) <= sizes[-1]
            assert len(residency.streamed) < count
            assert torch.equal(drawn(pipe), wanted["source"])
            assert residency.resident[0][1] == "und"
        assert residency.promote(10**9) == 0
    pipe.close()


@pytest.mark.usefixtures("fake_cuda")
def test_units_on_disk_go_on_streaming(wanted: dict[str, Tensor]) -> None:
    pipe = pipeline(CHECKPOINT, Residency(UNITS[1:4], 2, "disk"))
    assert pipe.model.residency.promote(10**9) == 0
    assert pipe.model.residency.streamed == UNITS[1:4]
    assert torch.equal(drawn(pipe), wanted["source"])
    pipe.close()


@pytest.mark.usefixtures("fake_cuda")
def test_promotion_that_finds_no_memory_leaves_a_model_that_works(
    wanted: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = pipeline(CHECKPOINT, Residency(UNITS, 2, "pageable"))

    def none_left(self: object, nbytes: int) -> Tensor:
        raise torch.OutOfMemoryError("made up")

    with monkeypatch.context() as full:
        full.setattr(residency_module.UnitBuffers, "_device_buffer", none_left)
        with pytest.raises(torch.OutOfMemoryError):
            pipe.model.residency.promote(10**9)
    assert torch.equal(drawn(pipe), wanted["source"])
    pipe.close()


@pytest.mark.usefixtures("fake_cuda")
def test_what_could_not_be_locked_is_buffered(wanted: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    made = itertools.count()

    def host_buffer(self: object, nbytes: int) -> tuple[Tensor, bool]:
        number = next(made)  # in one go: several threads ask
        return torch.empty(nbytes, dtype=torch.uint8), number < 3

    monkeypatch.setattr(residency_module.UnitBuffers, "host_buffer", host_buffer)
    pipe = pipeline(CHECKPOINT, Residency(UNITS, 3, "pinned"))
    assert len(pipe.model.bagel.decoder.source.source._pinned.buffers) == 3
    assert torch.equal(drawn(pipe), wanted["source"])


@pytest.mark.parametrize(("format", "streamed"), [("source", UNITS), ("int8", UNITS[1::2])], ids=["all", "int8 gen"])
def test_accelerate_moves_the_same_weights(
    int8: Path, wanted: dict[str, Tensor], answers: dict[str, list[int]], format: str, streamed: tuple[Unit, ...]
) -> None:
    folder = int8 if format == "int8" else CHECKPOINT
    pipe = pipeline(folder, Residency(streamed, 3, "pinned"), offload=ACCELERATE)
    source = pipe.model.bagel.decoder.source
    assert isinstance(source, AccelerateLayers)
    with pytest.raises(Cancelled):
        pipe.generate("a red circle", callback=lambda _: False, **DRAWING)
    assert torch.equal(drawn(pipe), wanted[format])
    assert answered(pipe) == answers[format]
    for layer, expert in UNITS:
        kinds = {p.device.type for p in source.layers[layer][expert].parameters()}
        assert kinds == ({"meta"} if (layer, expert) in streamed else {"cpu"})
    pipe.close()


def test_offload_is_chosen_by_name() -> None:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", offload="accelerate")
    assert pipe.model.plan.offload == ACCELERATE
    with pytest.raises(SettingError, match="choose one of native, accelerate"):
        BagelPipeline.from_pretrained(CHECKPOINT, offload="deepspeed")


class SlowSource:
    """Copies on a thread of its own, each begun by spoiling the slot: a slot that is still used would show it."""

    def __init__(self, buffers: dict[Unit, Tensor], seed: int) -> None:
        self.buffers, self.random = buffers, random.Random(seed)
        self.work: queue.SimpleQueue = queue.SimpleQueue()
        self.copies: list[Unit] = []
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def start(self, unit: Unit, slot: Tensor, stream: Stream, free: Event, ready: Event) -> SlowSource:
        ready.done.clear()
        self.copies.append(unit)
        self.work.put((self.buffers[unit], slot, free, ready))
        return self

    def queued(self) -> None:
        pass

    settled = queued

    def close(self) -> None:
        self.work.put(None)
        self.thread.join()

    @torch.inference_mode()
    def run(self) -> None:
        while (job := self.work.get()) is not None:
            buffer, slot, free, ready = job
            free.synchronize()
            slot.fill_(PREFETCHED)
            time.sleep(self.random.choice((0, 0, 0.001, 0.003)))
            slot[: buffer.numel()].copy_(buffer)
            ready.record(Stream())


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("seed", range(4))
def test_slow_copies_are_waited_for(wanted: dict[str, Tensor], seed: int) -> None:
    chance = random.Random(seed)
    pipe = pipeline(CHECKPOINT, Residency())
    decoder, held = pipe.model.bagel.decoder, pipe.model.residency._held
    streamed = sorted(chance.sample(UNITS, chance.randint(1, len(UNITS))))
    source = SlowSource({unit: held[unit].buffer for unit in streamed}, seed)
    layouts = {unit: held[unit].layout for unit in streamed}
    decoder.source = StreamedLayers(decoder.layers, layouts, source, chance.randint(2, 4), torch.device("cpu"))
    for _ in range(2):
        assert torch.equal(drawn(pipe), wanted["source"])
        answered(pipe)
    assert set(source.copies) == set(streamed)
    decoder.source.close()


class Failing:
    """A reader whose disk goes away for a while."""

    def __init__(self, read: object) -> None:
        self.read, self.left, self.failed = read, 10**9, 0

    def nbytes(self, unit: Unit) -> int:
        return self.read.nbytes(unit)

    def close(self) -> None:
        self.read.close()

    def __call__(self, *arguments: object) -> None:
        if self.left == 0:
            self.failed += 1
            raise CheckpointError("the disk went away")
        self.left -= 1
        self.read(*arguments)


@pytest.mark.usefixtures("fake_cuda")
@pytest.mark.parametrize("reads", [0, 1, 20])
def test_a_read_error_ends_its_request_and_no_other(wanted: dict[str, Tensor], reads: int) -> None:
    pipe = pipeline(CHECKPOINT, Residency(UNITS, 4, "disk"))
    source = pipe.model.bagel.decoder.source.source
    source._read = failing = Failing(source._read)
    failing.left = reads
    with pytest.raises(CheckpointError, match="disk went away"):
        drawn(pipe)
    assert failing.failed
    while not source._work.empty():
        time.sleep(0.001)  # copies begun ahead fail too
    failing.left = 10**9
    assert torch.equal(drawn(pipe), wanted["source"])


def staging_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "weight staging"]


@pytest.fixture
def no_other_workers() -> Iterator[None]:
    gc.collect()
    before = staging_threads()
    yield
    assert staging_threads() == before


@pytest.mark.usefixtures("fake_cuda", "no_other_workers")
@pytest.mark.parametrize("closing", [True, False], ids=["closed", "dropped"])
def test_a_pipeline_that_goes_takes_its_worker_along(closing: bool) -> None:
    gc.disable()  # memory on a card must not wait for the collector
    try:
        pipe = pipeline(CHECKPOINT, Residency(UNITS, 2, "pageable"))
        drawn(pipe)
        if closing:
            pipe.close()
            assert not pipe.model.residency.streamed
            assert not [p for p in pipe.model.bagel.parameters() if p.device.type != "meta"]
        del pipe
    finally:
        gc.enable()


@pytest.mark.usefixtures("fake_cuda")
def test_page_locked_memory_goes_after_the_last_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    pipe = pipeline(CHECKPOINT, Residency(UNITS, 2, "pageable"))
    source = pipe.model.bagel.decoder.source.source
    close = source.close
    monkeypatch.setattr(Stream, "synchronize", lambda self: order.append("copies done"))
    monkeypatch.setattr(source, "close", lambda: (order.append("source closed"), close()))
    pipe.model.bagel.decoder.source.close()
    assert order == ["copies done", "source closed", "copies done"]


@pytest.mark.usefixtures("fake_cuda")
def test_modules_let_go_of_slots_when_streaming_stops() -> None:
    pipe = pipeline(CHECKPOINT, Residency(UNITS, 2, "pageable"))
    drawn(pipe)
    slots = [slot.buffer.untyped_storage().data_ptr() for slot in pipe.model.bagel.decoder.source._slots]
    pipe.model.residency._close_source()
    used = {p.untyped_storage().data_ptr() for p in pipe.model.bagel.decoder.layers.parameters()}
    assert not used & set(slots)


def test_a_part_that_found_no_memory_finds_it_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(3, 2)
    layout = Layout.of(module)
    host = torch.empty(layout.nbytes, dtype=torch.uint8)
    part = StagedPart(module, layout, host, torch.device("cpu"))
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
        with pytest.raises(torch.OutOfMemoryError), part.on_device():
            pass
    with part.on_device(), part.on_device():
        assert module.weight.untyped_storage().data_ptr() != host.data_ptr()
    assert module.weight.untyped_storage().data_ptr() == host.data_ptr()


@pytest.mark.gpu
def test_a_larger_part_gets_the_memory_of_the_one_before() -> None:
    """Torch would keep what the smaller one took, which the larger one does not fit in."""
    parts = []
    for width in (4096, 8192):
        module = torch.nn.Linear(width, 4096)
        layout = Layout.of(module)
        parts.append(StagedPart(module, layout, torch.empty(layout.nbytes, dtype=torch.uint8), torch.device("cuda", 0)))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for part in parts:
        with part.on_device():
            held = torch.cuda.memory_reserved() - before
        assert held < part.host.nbytes + (32 << 20)
        assert torch.cuda.memory_reserved() - before < 32 << 20, "what it took is not kept for a request's keys"


def test_what_a_part_took_is_returned_when_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(3, 2)
    layout = Layout.of(module)
    part = StagedPart(module, layout, torch.empty(layout.nbytes, dtype=torch.uint8), torch.device("cpu"))
    host, where = part.host.untyped_storage().data_ptr(), []
    monkeypatch.setattr(staging, "empty_cache", lambda: where.append(module.weight.untyped_storage().data_ptr()))
    with part.on_device(), part.on_device():
        assert where == [host], "before it comes, once"
    assert where == [host, host], "and when nothing of it is left there"


@pytest.mark.usefixtures("fake_cuda")
def test_the_worker_and_the_end_belong_to_the_pipelines_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins with the first card for its current one, and the collector comes along on any thread."""
    inside: set[int] = set()
    used: list[bool] = []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        assert device == torch.device("cpu")
        inside.add(threading.get_ident())
        yield
        inside.discard(threading.get_ident())

    def watched(owner: type, name: str) -> None:
        method = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a: (used.append(threading.get_ident() in inside), method(*a))[1])

    monkeypatch.setattr(layers_module, "on", on)
    watched(layers_module.RamReader, "__call__")
    watched(layers_module.BufferedSource, "close")
    pipe = pipeline(CHECKPOINT, Residency(UNITS, 3, "pageable"))
    drawn(pipe)
    assert used and all(used)
    used.clear()
    pipe.close()
    assert used == [True]


def test_staging_goes_on_in_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nbytes: int, device: torch.device) -> Tensor:
        raise PinningRefused("no more")

    monkeypatch.setattr("lowmem_bagel.runtime.streaming.pinned.pinned_buffer", refuse)
    buffer, why = staging_buffer(100, torch.device("cpu"))
    assert buffer.numel() == 100 and why == "no more"
