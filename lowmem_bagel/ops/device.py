"""Which card work belongs to, and what all cards of a process share.

Nothing in the package asks torch for its current device: a pipeline's card is part of its plan, with its number. But
Triton launches on the current device's stream, whatever its tensors lie on, and so do streams, events, captures and
page locks that are given no device. So a pipeline loads, runs and closes inside `on(its device)`, its threads too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def indexed(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" alone is the first card, whichever is current."""
    device = torch.device(device)
    return torch.device("cuda", 0) if device.type == "cuda" and device.index is None else device


def on(device: torch.device) -> AbstractContextManager[object]:
    """`device` is this thread's current one inside; nothing happens for a processor."""
    return torch.cuda.device(indexed(device)) if device.type == "cuda" else nullcontext()


_CAPTURE = threading.Lock()
"""Held while a graph is captured: torch allows one capture in a process, and asserts that nobody empties the cache of
any card meanwhile; CUDA, that nobody waits for the whole card."""


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """What is launched inside, by this thread on the stream, becomes the graph. Others may launch and copy meanwhile.

    The stream is not torch's default one for captures, which belongs to the card that was current at the first.
    """
    with _CAPTURE, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        yield


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
