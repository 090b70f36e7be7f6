"""Memory that a conversion uses again and again.

New memory costs more than most of what is done with it: the system clears every page, and a virtual machine may have to
ask its host for it. A layer's tensors have the sizes of the one before, so their memory serves again.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from threading import RLock
from typing import TYPE_CHECKING

from .disk import page_aligned

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Block = NDArray[np.uint8]

SMALLEST_BYTES = 1 << 20
LARGEST_BYTES = 192 << 20
"""Larger blocks are not kept: an embedding comes once."""
FREE_BYTES = 768 << 20
"""What is kept at most while nobody uses it."""
GRAIN_BYTES = 2 << 20
SPARE = 1.25
"""How much larger a block may be than what it is used for."""


class Room:
    """Gives out CPU tensors; a tensor's memory comes back by itself when the last that shares it is gone. Threads may
    share a room."""

    def __init__(self) -> None:
        self._free: list[Block] = []
        self._taking = RLock()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor of this shape, its memory beginning with a page."""
        import torch

        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < SMALLEST_BYTES:
            return torch.from_numpy(page_aligned(nbytes)).view(dtype).view(*shape)
        block = self._take(nbytes)
        handle = block[:nbytes]  # PyTorch keeps this very array as long as a tensor needs it
        weakref.finalize(handle, self._give, block).atexit = False
        return torch.from_numpy(handle).view(dtype).view(*shape)

    def _take(self, nbytes: int) -> Block:
        with self._taking:
            fitting = [(b.nbytes, i) for i, b in enumerate(self._free) if nbytes <= b.nbytes <= SPARE * nbytes]
            if fitting:
                return self._free.pop(min(fitting)[1])
            while sum(block.nbytes for block in self._free) > FREE_BYTES:
                self._free.pop(0)
        return page_aligned(-(-nbytes // GRAIN_BYTES) * GRAIN_BYTES)

    def _give(self, block: Block) -> None:
        """Runs wherever the last reference goes, so it waits for nobody: others only ever add at the end."""
        if block.nbytes <= LARGEST_BYTES:
            self._free.append(block)
