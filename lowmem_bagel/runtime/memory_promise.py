"""Pipelines' promises of how much of a card's memory they take, held to by torch's allocator.

The allocator has one limit a card for the whole process, so the pipelines on a card share it: it is the sum of their
promises, less the process's context, which torch does not count. There is none while a pipeline without a promise is
there.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..hardware.profile import CONTEXT_BYTES


@dataclass(frozen=True, eq=False)
class Promise:
    """What one pipeline takes of a device at most, in bytes; None: it promises nothing."""

    device: torch.device
    max_vram: int | None


class MemoryPromises:
    """The promises that are held to. One that nobody refers to any more counts until the next one begins or ends.

    Args:
        set_fraction: as `torch.cuda.set_per_process_memory_fraction`.
        total_bytes: memory of a card.
    """

    def __init__(
        self, set_fraction: Callable[[float, torch.device], object], total_bytes: Callable[[torch.device], int]
    ) -> None:
        self._set_fraction, self._total_bytes = set_fraction, total_bytes
        self._lock = threading.Lock()
        self._held: weakref.WeakSet[Promise] = weakref.WeakSet()
        self._limited: set[torch.device] = set()

    def begin(self, device: torch.device, max_vram: int | None) -> Promise:
        """`device`: with its number where it is a card; elsewhere nothing is held to."""
        promise = Promise(device, max_vram)
        with self._lock:
            self._held.add(promise)
            self._limit(device)
        return promise

    def end(self, promise: Promise) -> None:
        """The memory has been given back; a second time does nothing."""
        with self._lock:
            self._held.discard(promise)
            self._limit(promise.device)

    def _limit(self, device: torch.device) -> None:
        if device.type != "cuda":
            return
        sizes = [promise.max_vram for promise in self._held if promise.device == device]
        promised = [size for size in sizes if size is not None]
        if sizes and len(promised) == len(sizes):
            allowed = max(0, sum(promised) - CONTEXT_BYTES)
            self._set_fraction(min(1.0, allowed / self._total_bytes(device)), device)
            self._limited.add(device)
        elif device in self._limited:
            self._set_fraction(1.0, device)
            self._limited.remove(device)


def _total_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


PROMISES = MemoryPromises(
    lambda fraction, device: torch.cuda.set_per_process_memory_fraction(fraction, device), _total_bytes
)
"""Of this process, as the allocator's limit is."""
