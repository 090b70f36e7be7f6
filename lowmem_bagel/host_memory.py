"""Host memory for weights that wait: page-locked exactly, or plain with small page-locked staging buffers."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from .switches import why_off


class PinningRefused(Exception):
    """The system would not page-lock the memory; the text is why."""


def pinned_buffer(nbytes: int) -> Tensor:
    """uint8 [nbytes], page-locked, exactly as large as asked for.

    torch's own `pin_memory` rounds up to powers of two; registering plain memory does not.

    Raises:
        PinningRefused: a limit of the system was reached.
    """
    off = why_off("pinning")
    if off is not None:
        raise PinningRefused(off)
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    buffer[::4096].zero_()  # touch the pages: registering untouched memory is slower
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(buffer.data_ptr(), nbytes, 0)
    if int(error) != 0:
        raise PinningRefused(f"cudaHostRegister of {nbytes / 1e9:.2f} GB: {cudart.cudaGetErrorString(error)}")
    weakref.finalize(buffer, _unregister, buffer.data_ptr())
    return buffer


def staging_buffer(nbytes: int) -> tuple[Tensor, str | None]:
    """A buffer that copies to a device go through, page-locked if the system allows it; and why it is not.

    From plain memory the same copies are right, and wait on the host.
    """
    try:
        return pinned_buffer(nbytes), None
    except PinningRefused as refusal:
        return torch.empty(nbytes, dtype=torch.uint8), str(refusal)


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
