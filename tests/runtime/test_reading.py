"""Reading by several threads: the same bytes as by one, errors where the caller is, and no thread left over."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import CheckpointError
from lowmem_bagel.runtime import reading
from lowmem_bagel.runtime.reading import Readers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if "reader" in thread.name]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor takes many reads, and a card's many copies."""
    monkeypatch.setattr(reading, "PIECE", 1000)
    monkeypatch.setattr(reading, "CHUNK", 700)


def whole(folder: ModelFolder, name: str) -> Tensor:
    return torch.full(folder.entry(name).shape, float("nan"), dtype=torch.bfloat16)


@pytest.mark.parametrize("on_a_card", [False, True])
def test_every_byte_arrives(
    small_pieces: None, fake_cuda: None, monkeypatch: pytest.MonkeyPatch, reference_checkpoint: Path, on_a_card: bool
) -> None:
    folder = ModelFolder.open(reference_checkpoint)
    monkeypatch.setattr(reading, "staging_buffer", lambda nbytes, device: (torch.empty(nbytes).byte(), None))
    names = [name for name, stored in folder.stored.items() if stored.as_it_is and stored.entry.dtype == "BF16"]
    assert len(names) > 50
    with Readers(CPU, 10**9) as readers:
        if on_a_card:  # the way by small buffers
            monkeypatch.setattr(readers, "_read_into", readers._send)

        def work(name: str) -> Tensor:
            target = whole(folder, name)
            readers.copy(target, folder.tensor(name), folder.stored[name])
            return target

        found = {name: readers.submit(lambda name=name: work(name)) for name in names}  # type: ignore[misc]
        for name in names:
            assert torch.equal(readers.result(found[name]), folder.tensor(name)), name
    assert readers.read_bytes == sum(folder.entry(name).nbytes for name in names)


def test_what_is_not_stored_as_it_is_used_is_converted(reference_checkpoint: Path) -> None:
    folder = ModelFolder.open(reference_checkpoint)
    name = "language_model.model.norm.weight"
    value, target = folder.tensor(name), torch.empty(folder.entry(name).shape)
    with Readers(CPU, 10**9) as readers:
        readers.copy(target, value, folder.stored[name])
        readers.copy(target, value + 1, None)
    assert torch.equal(target, (value + 1).float())
    assert readers.read_bytes == 0


def test_a_file_that_shrank_is_told_to_the_caller(spoilable: Path) -> None:
    folder = ModelFolder.open(spoilable)
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    stored = folder.stored[name]
    stored.file.path.write_bytes(stored.file.path.read_bytes()[: stored.entry.start + 10])
    with pytest.raises(CheckpointError, match="ends before its weights"), Readers(CPU, 10**9) as readers:
        readers.result(readers.submit(lambda: readers.copy(whole(folder, name), whole(folder, name), stored)))
    stored.file.path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"), Readers(CPU, 10**9) as readers:
        readers.result(readers.submit(lambda: readers.copy(whole(folder, name), whole(folder, name), stored)))


def test_an_error_stops_all_threads(small_pieces: None, reference_checkpoint: Path) -> None:
    folder = ModelFolder.open(reference_checkpoint)
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    begun = threading.Semaphore(0)

    def endless(readers: Readers) -> None:
        begun.release()
        while True:
            readers.copy(whole(folder, name), folder.tensor(name), folder.stored[name])

    waiting: list[Future[None]] = []

    def interrupted() -> None:
        with Readers(CPU, 10**9) as readers:
            waiting.extend(readers.submit(lambda: endless(readers)) for _ in range(reading.READERS + 5))
            assert begun.acquire(timeout=20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(work.done() for work in waiting)
    assert waiting[-1].cancelled() or waiting[-1].exception() is not None


def test_progress_is_told_where_the_caller_is(reference_checkpoint: Path) -> None:
    seen: list[tuple[int, int, int]] = []
    BagelPipeline.from_pretrained(
        reference_checkpoint, device="cpu", progress=lambda *told: seen.append((*told, threading.get_ident()))
    ).close()
    done = [told[0] for told in seen]
    assert done == sorted(done) and done[-1] == seen[-1][1] > 0
    assert {told[2] for told in seen} == {threading.get_ident()}


def test_a_load_can_be_given_up(reference_checkpoint: Path) -> None:
    def enough(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BagelPipeline.from_pretrained(reference_checkpoint, device="cpu", progress=enough)


def test_loading_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, reference_checkpoint: Path) -> None:
    """Importing PyTorch's takes seconds, and PyTorch does as soon as random numbers are drawn on the meta device."""
    for name in [known for known in sys.modules if known.split(".")[:2] == ["torch", "_dynamo"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    BagelPipeline.from_pretrained(reference_checkpoint, device="cpu").close()


def test_the_timeline_has_all_seconds(reference_checkpoint: Path) -> None:
    pipe = BagelPipeline.from_pretrained(reference_checkpoint, device="cpu")
    timeline = pipe.model.timeline
    assert {"opening", "planning", "checks", "trials", "tokenizer", "building", "weights"} <= timeline.phases.keys()
    assert all(seconds >= 0 for seconds in timeline.phases.values())
    assert timeline.read_bytes > 0
    pipe.close()
