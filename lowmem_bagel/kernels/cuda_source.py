"""CUDA sources for one arithmetic on one device, compiled when a kernel of theirs is first used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import nvrtc

THREADS = 256
ROWS_A_BLOCK = 16
"""Rows of a packed weight that a block multiplies with one token."""
MOST_BLOCKS = 4096
"""By which a weight is converted."""

LoadModule = Callable[..., Any]
"""`nvrtc.load`, or what stands in for it."""


class CudaSource:
    """half: fp16 or bf16, the dtype of attention and of weights. `load` stands in for NVRTC."""

    def __init__(self, device: torch.device, half: torch.dtype, load: LoadModule | None = None) -> None:
        self.device, self.half = device, half
        self._load = load or (lambda source, defines=None: nvrtc.load(source, device, defines))
        self._modules: dict[tuple[str, tuple[tuple[str, int], ...]], Any] = {}

    def kernel(self, source: str, name: str, *, shared_bytes: int = 0, **defines: int) -> Any:
        """The kernel of a source that is compiled with these defines, for so much dynamic shared memory.

        Raises:
            CudaError: it cannot be compiled.
        """
        key = source, tuple(defines.items())
        if key not in self._modules:
            arithmetic = {"BF16_ARITHMETIC": int(self.half == torch.bfloat16)}
            self._modules[key] = self._load(source, defines={**arithmetic, **defines})
        return self._modules[key].kernel(name, shared_bytes)


def conversion_grid(words: int) -> tuple[int, int]:
    """Blocks that convert a weight of so many words, a word a thread at a time."""
    return min(MOST_BLOCKS, -(-words // THREADS)), 1
