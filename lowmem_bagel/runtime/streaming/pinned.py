"""Host memory for weights that wait: page-locked exactly, or plain with small page-locked staging buffers."""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch import Tensor

from ...hardware.features import why_off
from ...ops.device import on


class PinningRefused(Exception):
    """The system would not page-lock the memory; the text is why."""


PAGE = 4096
"""Bytes; what the system locks."""


def pinned_buffer(nbytes: int, device: torch.device) -> Tensor:
    """uint8 [nbytes], page-locked for copies to a card; takes at most two pages more.

    torch's own `pin_memory` rounds up to powers of two; registering plain memory does not.

    Raises:
        PinningRefused: a limit of the system was reached.
    """
    off = why_off("pinning")
    if off is not None:
        raise PinningRefused(off)
    size = -(-nbytes // PAGE) * PAGE
    memory = torch.empty(size + PAGE, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE
    pages = memory[start : start + size]  # whole pages, which no other registered buffer shares
    pages[::PAGE].zero_()  # touch them: registering untouched memory is slower
    cudart = torch.cuda.cudart()
    with on(device):  # registering with 0 locks them for the current card alone
        error = cudart.cudaHostRegister(pages.data_ptr(), size, 0)
    if int(error) != 0:
        _forget_last_error(device)
        raise PinningRefused(f"cudaHostRegister of {nbytes / 1e9:.2f} GB: {cudart.cudaGetErrorString(error)}")
    buffer = pages[:nbytes]
    # At the end of the process the system unlocks the pages itself, when CUDA may be gone already.
    weakref.finalize(buffer, _unregister, buffer.data_ptr(), device).atexit = False
    return buffer


def _forget_last_error(device: torch.device) -> None:
    """CUDA keeps a refusal for whoever asks next: let that be this kernel, and not some innocent one later."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


def staging_buffer(nbytes: int, device: torch.device) -> tuple[Tensor, str | None]:
    """A buffer that copies to the device go through, page-locked if the system allows it; and why it is not.

    From plain memory the same copies are right, and wait on the host.
    """
    try:
        return pinned_buffer(nbytes, device), None
    except PinningRefused as refusal:
        return torch.empty(nbytes, dtype=torch.uint8), str(refusal)


def _unregister(address: int, device: torch.device) -> None:
    with on(device):  # the collector may come along on any thread
        torch.cuda.cudart().cudaHostUnregister(address)
