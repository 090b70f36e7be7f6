"""Host seconds of an evaluation's launches: by one thread, by two at the same time, and as one graph.

Launches are asynchronous: what is timed is how long the host takes until the last one has returned, with the device
idle at first. Two branches have keys and a stream of their own on one card, so that they launch as branches on two
cards do; how long the card then takes for both together is not what two cards would. Beside that, guided steps in a
row, of which one branch is evaluated as on a second card that is the same one: where the host takes longer than both
branches, what a step takes on two cards.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem_bagel.errors import first_line
from lowmem_bagel.generation.drawing import branch_cache
from lowmem_bagel.generation.probe import PictureProbe, looking
from lowmem_bagel.ops.device import captured, empty_cache, synchronize
from lowmem_bagel.pipeline import BagelPipeline
from lowmem_bagel.runtime.elsewhere import BranchesThere, CardThread, Launch
from lowmem_bagel.sampling.step_caches.registry import step_cache

from .measuring import PROMPT

T = 0.5
"""The time at which is evaluated; any is launched alike."""
STEPS = 8
"""Guided steps in a row."""


def launches(pipe: BagelPipeline, size: int, repeat: int) -> dict[str, Any]:
    """Figures of an evaluation of one branch of a picture of size x size pixels, launched whatever the plan says."""
    pipe.model.plan = replace(pipe.model.plan, graph_tokens=0)
    with looking(pipe.model):
        return _Launches(pipe, size, repeat).measured()


def _probe(pipe: BagelPipeline, size: int) -> PictureProbe:
    return PictureProbe(pipe.model, pipe.prepare([PROMPT], output="image", height=size, width=size, seed=0))


class _Branch:
    """An evaluation with keys and a stream of its own."""

    def __init__(self, pipe: BagelPipeline, size: int) -> None:
        self.device = pipe.model.bagel.device
        probe = _probe(pipe, size)
        self._sampler = probe.sampler()
        self._x = probe.noise.to(self.device)
        self._time = torch.full((1,), T, device=self.device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.found = torch.empty(0)

    def aside(self) -> AbstractContextManager[Any]:
        """The branch's stream, whichever thread launches."""
        return torch.cuda.stream(self._stream)

    def evaluate(self) -> None:
        """On the current stream."""
        self.found = self._sampler.plain_velocity(self._x, self._time)

    def launch(self) -> None:
        with self.aside():
            self.evaluate()


class _Launches:
    def __init__(self, pipe: BagelPipeline, size: int, repeat: int) -> None:
        self.device, self.repeat = pipe.model.bagel.device, repeat
        self.pipe, self.size = pipe, size
        self.one, self.other = (_Branch(pipe, size) for _ in range(2))

    def measured(self) -> dict[str, Any]:
        one, other = self.one, self.other
        card = CardThread(1, self.device, self.device, lambda *_: None)

        def by_two_threads() -> None:
            begun = card.submit(other.launch)
            one.launch()
            begun.result()

        def by_one_thread() -> None:
            other.launch()
            one.launch()

        try:
            found = {
                "alone": self._timed(one.launch),
                "both by one thread": self._timed(by_one_thread),
                "both by two threads": self._timed(by_two_threads),
            }
            with short_operations():
                found["alone, beside a thread of short operations"] = self._timed(one.launch)
            steps = {
                "one card": self._steps([]),
                "second launched on by one thread": self._steps([partial(self._beside, card, card.at_once)]),
                "second launched on by its own": self._steps([partial(self._beside, card, card.submit)]),
            }
        finally:
            card.close()
        return {"launches": self._count(), "seconds": found, "step_seconds": steps, **self._by_graph()}

    def _steps(self, beside: Sequence[Callable[[PictureProbe], BranchesThere]]) -> float:
        """Seconds of a guided step, of some in a row that nobody waits for between."""
        probe = _probe(self.pipe, self.size)
        elsewhere = [make(probe) for make in beside]
        sampler, x = probe.sampler(), probe.noise.to(self.device)
        there = [branch for other in elsewhere for branch in other.branches]
        sampler.elsewhere = elsewhere
        sampler.here.views = {branch: view for branch, view in sampler.here.views.items() if branch not in there}
        time = torch.full((1,), T, device=self.device)

        def run() -> None:
            following = x
            for _ in range(STEPS):
                following = following - sampler.velocity(following, T, time) / STEPS

        return self._timed(run)["done"] / STEPS

    def _beside(self, card: CardThread, launch: Launch, probe: PictureProbe) -> BranchesThere:
        """The branch without the text as another card evaluates it."""
        model = self.pipe.model
        views, named = probe.contexts.branches().distinct()
        markers = model.bagel.embed_text(torch.tensor((model.tokenizer.vision_start, model.tokenizer.vision_end)))
        given = {named["text"]: views[named["text"]]}, markers, probe.contexts.scratch, probe.frames
        make_cache, cache = branch_cache(probe.settings), step_cache(probe.settings.step_cache)
        return BranchesThere(card, launch, model.bagel, model.attention, *given, make_cache, cache.predicts)

    def _timed(self, work: Callable[[], None]) -> dict[str, float]:
        """Seconds until all is launched, and until it is done: medians of some, after one that warms up."""
        host, done = [], []
        for _ in range(self.repeat + 1):
            synchronize(self.device)
            start = time.perf_counter()
            work()
            host.append(time.perf_counter() - start)
            synchronize(self.device)
            done.append(time.perf_counter() - start)
        return {"host": statistics.median(host[1:]), "done": statistics.median(done[1:])}

    def _by_graph(self) -> dict[str, Any]:
        """The same evaluation captured once and replayed; or why it is not."""
        if self.device.type != "cuda":
            return {"graph": None, "graph_refused": f"needs a CUDA GPU, not {self.device.type}"}
        one = self.one
        one.launch()
        wanted = self._result(one)
        empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        try:
            graph = captured(self.device, one.evaluate, one.evaluate)
        except RuntimeError as error:
            return {"graph": None, "graph_refused": first_line(error)}
        empty_cache()
        held = torch.cuda.memory_reserved(self.device) - before
        one.found.zero_()
        timed = self._timed(graph.replay)
        return {"graph": timed | {"bytes": held, "same_bits": torch.equal(self._result(one), wanted)}}

    def _result(self, branch: _Branch) -> Tensor:
        synchronize(self.device)
        return branch.found.cpu()

    def _count(self) -> int:
        """Kernels and copies of an evaluation; of a processor, operations."""
        from torch.profiler import ProfilerActivity, profile

        on_card = self.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as profiler:
            self.one.launch()
            synchronize(self.device)
        spent = "self_device_time_total" if on_card else "self_cpu_time_total"
        return sum(event.count for event in profiler.key_averages() if getattr(event, spent))


@contextmanager
def short_operations() -> Iterator[None]:
    """Beside it a thread runs operations of some microseconds on the processor, each of which lets go of Python's lock
    and takes it again, as a launch does; no card has anything to do with them."""
    over = threading.Event()

    def work() -> None:
        value = torch.zeros(1)
        while not over.is_set():
            value.add_(1)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
