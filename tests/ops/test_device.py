"""Work belongs to its pipeline's card: nothing reads torch's current device, and what goes by it runs inside `on`."""

from __future__ import annotations

import ast
import contextlib
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from unittest.mock import MagicMock

import pytest
import torch

import lowmem_bagel
from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.ops import device as devices
from lowmem_bagel.ops.device import GraphMemory, captured, empty_cache, indexed, on, synchronize
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.runtime import loaded, loader
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.settings import LoadOptions

PACKAGE = Path(lowmem_bagel.__file__).parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "converters" not in path.parts)
OF_THE_CURRENT_DEVICE = re.compile(
    r"torch\.cuda\.(current_device|set_device|is_bf16_supported)\("
    r"|torch\.cuda\.(\w*[sS]tream|synchronize|mem_get_info|get_device_\w+|\w+_memory_\w+|memory_\w+)\(\)"
    r"|torch\.cuda\.graph\((?!.*stream=)"
    r"|torch\.\w+\(.*device='cuda'[,)]|torch\.device\('cuda'\)|\.to\('cuda'|\.cuda\(\)|\.record\(\)"
    r"|torch\.backends\.[\w.]+ = "
)
"""What reads or changes whatever device is current, or a switch of the process; a statement stands in one line."""


def found(source: str) -> list[str]:
    lines = ast.unparse(ast.parse(source)).splitlines()
    return [line.strip() for line in lines if OF_THE_CURRENT_DEVICE.search(line)]


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(PACKAGE)) for path in SOURCES])
def test_nothing_reads_the_current_device(path: Path) -> None:
    assert found(path.read_text(encoding="utf-8")) == []


def test_the_search_finds_what_reads_it() -> None:
    text = """
torch.cuda.current_device()
torch.cuda.current_stream()
torch.cuda.Stream()
torch.cuda.graph(g, capture_error_mode="thread_local")
torch.zeros(1, device="cuda")
torch.device("cuda")
x.cuda()
read.record()
torch.backends.cudnn.allow_tf32 = False
"""
    assert len(found(text)) == len(text.splitlines()) - 1
    fine = 'torch.device("cuda", 0); torch.cuda.Stream(d); torch.cuda.graph(g, stream=s); e.record(s); f(card="cuda")'
    assert found(fine) == []


def test_a_card_without_a_number_is_the_first() -> None:
    assert indexed("cuda") == indexed(torch.device("cuda")) == torch.device("cuda", 0)
    assert indexed("cuda:3") == torch.device("cuda", 3)
    assert indexed("cpu") == torch.device("cpu")


def test_a_processor_needs_nothing() -> None:
    with on(torch.device("cpu")):
        synchronize(torch.device("cpu"))


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Threads that are inside their pipeline's device just now, as `on` would make a card the current one."""
    threads: set[int] = set()

    @contextlib.contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        outermost = threading.get_ident() not in threads
        threads.add(threading.get_ident())
        yield
        if outermost:
            threads.remove(threading.get_ident())

    for module in (loader, loaded):
        monkeypatch.setattr(module, "on", entered)
    return threads


def test_loading_a_request_and_closing_run_inside_the_device(
    inside: set[int], reference_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, seen = threading.get_ident(), []
    select, residency = loader.select_backend, loader.UnitBuffers

    def selecting(*arguments: object, **options: object) -> object:
        seen.append(("select", here in inside))
        return select(*arguments, **options)

    class Watched(residency):
        def close(self) -> None:
            seen.append(("close", here in inside))
            super().close()

    monkeypatch.setattr(loader, "select_backend", selecting)
    monkeypatch.setattr(loader, "UnitBuffers", Watched)
    monkeypatch.setattr(loader, "stored_linears", lambda *given, f=loader.stored_linears: (
        seen.append(("linears", here in inside)), f(*given))[1])  # fmt: skip
    folder = ModelFolder.open(reference_checkpoint)
    pipe = BagelPipeline(load_model(folder, plan_for(folder, LoadOptions(device="cpu", tasks=("ask",)))))
    assert not inside
    pipe.ask("what?", max_new_tokens=4, callback=lambda _: seen.append(("request", here in inside)))
    pipe.close()
    assert list(dict.fromkeys(seen)) == [("linears", True), ("select", True), ("request", True), ("close", True)]
    assert not inside


def test_the_cache_is_not_emptied_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch asserts that it is not; and it captures one graph at a time in a process."""
    happened: list[str] = []
    other = threading.Thread(target=empty_cache)

    @contextlib.contextmanager
    def capturing(graph: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        happened.append(f"begin on {stream.device}, {capture_error_mode}")
        yield
        happened.append("end")

    def launch() -> None:
        other.start()
        other.join(0.2)
        assert other.is_alive(), "it waits"

    card = torch.device("cuda", 1)
    monkeypatch.setattr(devices, "_aside", lambda device: MagicMock(device=device))
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("emptied"))
    captured(card, launch, lambda: happened.append("warm-up"))
    other.join(20)
    assert happened == ["warm-up", "begin on cuda:1, thread_local", "end", "emptied"]
    assert not devices._CAPTURE.locked()


class Recording:
    """In place of a CUDA graph: says what happens to it."""

    happened: ClassVar[list[object]] = []

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.happened.append(("begin", pool, capture_error_mode))

    def capture_end(self) -> None:
        self.happened.append("end")

    def pool(self) -> str:
        return "kept"


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Captures on a card that is not there; nothing but what `GraphMemory` does."""
    monkeypatch.setattr(devices, "_aside", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: Recording.happened.append("emptied"))
    monkeypatch.setattr(Recording, "happened", [])
    return Recording.happened


def test_graphs_of_one_memory_share_it_and_leave_the_cache_alone(recording: list[object]) -> None:
    """The first of them, of nothing, keeps what they share from being forgotten."""
    memory, where = GraphMemory(), torch.device("cpu")
    for name in ("one", "two"):
        captured(where, lambda name=name: recording.append(name), lambda: None, memory)
    begin = ("begin", "kept", "thread_local")
    assert recording == [("begin", None, "thread_local"), "end", begin, "one", "end", begin, "two", "end"]


def test_where_a_graph_finds_no_memory_what_torch_keeps_is_given_back(recording: list[object]) -> None:
    full = [torch.OutOfMemoryError("full")]

    def launch() -> None:
        if full:
            raise full.pop()
        recording.append("launched")

    captured(torch.device("cpu"), launch, lambda: None, GraphMemory())
    assert recording[3:] == ["end", "emptied", ("begin", "kept", "thread_local"), "launched", "end"]
