"""Host memory for weights that wait: page-locked exactly, or plain with small page-locked staging buffers."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref

import torch
from torch import Tensor

from ...hardware.features import why_off
from ...ops.device import on


class PinningRefused(Exception):
    """The system would not page-lock the memory; the text is why."""


PAGE = 4096
"""Bytes; what the system locks."""
HUGE_PAGE = 2 << 20


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
    _advise_huge_pages(pages)
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


def plain_buffer(nbytes: int) -> Tensor:
    """uint8 [nbytes] in ordinary memory, whose first touch is quick where the system has huge pages."""
    memory = torch.empty(nbytes, dtype=torch.uint8)
    _advise_huge_pages(memory)
    return memory


def _advise_huge_pages(memory: Tensor) -> None:
    """Ask for pages of 2 MB inside the memory: fewer to fault in, to lock and to look up. A hint, that may be refused;
    no page reaches beyond what was allocated, so it takes no more memory."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    start = -(-memory.data_ptr() // PAGE) * PAGE
    size = (memory.data_ptr() + memory.numel() - start) // PAGE * PAGE
    if advice is not None and size >= HUGE_PAGE:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_int(advice))


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
