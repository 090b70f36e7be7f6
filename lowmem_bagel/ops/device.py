"""Which card work belongs to, and what all cards of a process share.

Nothing in the package asks torch for its current device: a pipeline's card is part of its plan, with its number. But
Triton launches on the current device's stream, whatever its tensors lie on, and so do streams, events, captures and
page locks that are given no device. So a pipeline loads, runs and closes inside `on(its device)`, its threads too.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def indexed(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" alone is the first card, whichever is current."""
    device = torch.device(device)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def on(device: torch.device) -> AbstractContextManager[object]:
    """`device` is this thread's current one inside; nothing happens for a processor."""
    return torch.cuda.device(indexed(device)) if device.type == "cuda" else nullcontext()


def enter(device: torch.device) -> None:
    """Make a card's context this thread's. Torch's first call into CUDA does, but not every call of torch's is one, and
    calls of the driver, as in Triton's bulk copies and in `kernels.nvrtc`, need it. Not while a graph is captured."""
    torch.cuda.current_stream(device).query()


_CAPTURE = threading.Lock()
"""Held while a graph is captured: torch allows one capture in a process, and asserts that nobody empties the cache of
any card meanwhile; CUDA, that nobody waits for the whole card."""


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """A card's stream for captures, used with `_CAPTURE` held. Torch's own belongs to the card that was current at the
    first capture; and torch hands out few streams again and again, but none of high priority to our copies."""
    return torch.cuda.Stream(device, priority=-1)


class GraphMemory:
    """What the graphs of one model compute in, which are replayed one after the other: the next one takes what was let
    go of by one before.

    Without it torch gives all that it keeps of freed memory back to the driver before every capture, and the request
    after has to ask for all of it again, which took a quarter of the time to a second question's first token.
    """

    def __init__(self) -> None:
        self._keeper: torch.cuda.CUDAGraph | None = None
        """A graph that is never replayed: torch forgets a pool with the last graph in it."""

    def capture(self, device: torch.device, launch: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """A graph of what `launch` launches on the current stream."""
        if self._keeper is None:
            self._keeper = _recorded(lambda: torch.zeros(1, device=device), None)
        pool = self._keeper.pool()
        try:
            return _recorded(launch, pool)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        return _recorded(launch, pool)


def _recorded(launch: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        launch()
    finally:
        graph.capture_end()
    return graph


def captured(
    device: torch.device, launch: Callable[[], None], warm_up: Callable[[], None], memory: GraphMemory | None = None
) -> torch.cuda.CUDAGraph:
    """A graph of what `launch` launches, after `warm_up` has run as it is. Others may launch and copy meanwhile.

    `memory`: what it computes in, and leaves to others; else its own.
    """
    with _CAPTURE:
        here, aside = torch.cuda.current_stream(device), _aside(device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):  # around the capture too, which does not put the stream back where it fails
            warm_up()
            here.wait_stream(aside)
            if memory is not None:
                return memory.capture(device, launch)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                launch()
    return graph


def empty_cache() -> None:
    """What torch keeps of freed memory goes back to the cards, once no graph is being captured; without any, nothing
    happens."""
    with _CAPTURE:
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for all work on a card, of every thread, once no graph is being captured; for a processor at once."""
    if device.type == "cuda":
        with _CAPTURE:
            torch.cuda.synchronize(device)
