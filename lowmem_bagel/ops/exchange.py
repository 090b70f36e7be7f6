"""Tensors on their way from one card to another: in the order of both cards' work, and without the host waiting.

Cards that can read each other's memory copy straight. Others (most consumer cards) go through page-locked memory of the
host, in pieces. On a processor, which stands in for cards in tests, either way is a copy.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import first_line
from ..hardware.features import why_off
from .device import on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Route = Literal["peer", "host"]

PIECE_BYTES = 16 << 20
"""Of page-locked memory, at most."""
TRIAL_VALUES = 1 << 18
PIECES = 2
"""While one is filled, the other is emptied."""


class OutOfMemoryOn(torch.OutOfMemoryError):
    """A card's memory ran out that is not the first one's; `card` counts from there."""

    def __init__(self, card: int, said: str) -> None:
        super().__init__(said)
        self.card = card


@contextmanager
def memory_of(card: int) -> Iterator[None]:
    """Where memory runs out inside, it is this card's.

    Raises:
        OutOfMemoryOn: it ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryOn(card, str(error)) from error


class Mark:
    """A point in a device's work: behind all that the calling thread has queued there."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self, device: torch.device) -> None:
        """What the calling thread queues on a device from now on comes behind the point. The host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream(device).wait_event(self._event)


def route_between(source: torch.device, target: torch.device) -> tuple[Route, str]:
    """How tensors get from one device to the other and back, and why so."""
    off = why_off("peer")
    if off is not None:
        return "host", f"through the host's memory: peer to peer is {off}"
    if "cpu" in (source.type, target.type):
        return "peer", "in one memory"
    through = "through page-locked memory of the host:"
    if not all(torch.cuda.can_device_access_peer(*pair) for pair in ((source, target), (target, source))):
        return "host", f"{through} these cards cannot read each other's"
    if not _arrives(source, target):
        return "host", f"{through} what went straight from card to card came out wrong"
    return "peer", "straight from card to card"


def _arrives(source: torch.device, target: torch.device) -> bool:
    """Whether what goes straight there and back is what it was: on some boards it is not, though cards say they can."""
    sent = torch.arange(TRIAL_VALUES, dtype=torch.int32, device=source)
    there, back = (torch.zeros(TRIAL_VALUES, dtype=torch.int32, device=device) for device in (target, source))
    there.copy_(sent)
    back.copy_(there)
    return torch.equal(back, sent)


class Bridge:
    """Carries tensors from one device to another.

    What it queues is ordered on the current streams that the calling thread has on both, so that whoever works on the
    target in another thread waits for a `Mark` made after it.

    Args:
        note: told why the host's memory is not page-locked, where it is not. Copies then wait on the host.
    """

    def __init__(self, source: torch.device, target: torch.device, route: Route, note: Callable[[str], None]) -> None:
        self.source, self.target, self.route, self._note = source, target, route, note
        self._pieces: list[Tensor] = []
        self._read: list[Mark | None] = []

    def carry(self, tensor: Tensor, into: Tensor | None = None) -> Tensor:
        """The tensor on the target: `into`, which is contiguous and of its shape and dtype, or a new one."""
        if into is None:
            into = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.target)
        assert tensor.shape == into.shape and tensor.dtype == into.dtype
        if self.route == "peer":
            with on(self.source):
                return into.copy_(tensor, non_blocking=True)
        self._through_host(_bytes(tensor.contiguous()), _bytes(into))
        return into

    def _through_host(self, source: Tensor, target: Tensor) -> None:
        """uint8 tensors of one length."""
        size = min(PIECE_BYTES, len(source))
        if not self._pieces or len(self._pieces[0]) < size:
            self._pieces, self._read = [self._locked(size) for _ in range(PIECES)], [None] * PIECES
        for index, (here, there) in enumerate(zip(source.split(size), target.split(size), strict=True)):
            piece, read = self._pieces[index % PIECES][: len(here)], self._read[index % PIECES]
            if read is not None:
                read.wait(self.source)
            with on(self.source):
                piece.copy_(here, non_blocking=True)
            Mark(self.source).wait(self.target)
            with on(self.target):
                there.copy_(piece, non_blocking=True)
            self._read[index % PIECES] = Mark(self.target)

    def _locked(self, size: int) -> Tensor:
        """uint8 [size], page-locked for every card, or plain where the system refuses."""
        if self.source.type == "cuda":
            why = why_off("pinning")
            if why is None:
                try:
                    return torch.empty(size, dtype=torch.uint8, pin_memory=True)
                except RuntimeError as error:
                    why = first_line(error)
            self._note(f"not page-locked ({why}); copies wait on the host")
        return torch.empty(size, dtype=torch.uint8)


def _bytes(tensor: Tensor) -> Tensor:
    """uint8 [nbytes], the same memory."""
    return tensor.view(-1).view(torch.uint8)
