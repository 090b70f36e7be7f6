"""Weights in GGUF's blocks made floats, or multiplied with one token as they are read: in PyTorch's operations, and by
CUDA kernels, which NVRTC compiles for any card.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...checkpoint.gguf_blocks import BLOCK_TYPES, decoded
from ...kernels.cuda_source import ROWS_A_BLOCK, THREADS, CudaSource, conversion_grid

SOURCE = "formats/gguf/packed.cu"
WORD = 8
"""Values that a thread takes at a time."""


class PackedBlocks:
    """The reference, for weights of one type."""

    compiled = False

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def shape(self, weight: Tensor, width: int) -> tuple[int, int]:
        """Of the weight [out, in] that these bytes are, `width` values a row."""
        return weight.numel() // BLOCK_TYPES[self.kind].bytes_of((width,)), width

    def decoded(self, weight: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """uint8 [nbytes] -> [out, width]."""
        return decoded(weight, self.kind, self.shape(weight, width), dtype)

    def times_token(self, token: Tensor, weight: Tensor) -> Tensor:
        """token fp16 [1, width] @ weight.T, float32 [1, out]."""
        return token.float() @ self.decoded(weight, token.shape[1], torch.float32).t()


class CudaPackedBlocks(PackedBlocks):
    """By our kernels, where the weight's place in memory allows it."""

    compiled = True

    def __init__(self, kind: str, source: CudaSource) -> None:
        super().__init__(kind)
        self._source, self._number = source, int(kind[1])

    def decoded(self, weight: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        if dtype != self._source.half or weight.data_ptr() % 4:
            return super().decoded(weight, width, dtype)
        assert weight.is_contiguous(), "the weight must be contiguous"
        out = torch.empty(self.shape(weight, width), dtype=dtype, device=weight.device)
        words = out.numel() // WORD
        kernel = self._source.kernel(SOURCE, "blocks_to_half", KIND=self._number)
        kernel(conversion_grid(words), THREADS, [weight, out, ctypes.c_uint64(words)])
        return out

    def times_token(self, token: Tensor, weight: Tensor) -> Tensor:
        if weight.data_ptr() % 4:
            return super().times_token(token, weight)
        assert token.dtype == torch.float16, "a token is scaled to fp16 before"
        assert weight.is_contiguous(), "the weight must be contiguous"
        rows, width = self.shape(weight, token.shape[1])
        out = torch.empty(1, rows, dtype=torch.float32, device=weight.device)
        arguments = [token, weight, out, ctypes.c_uint32(rows), ctypes.c_uint32(width)]
        kernel = self._source.kernel(SOURCE, "blocks_times_token", KIND=self._number)
        kernel((-(-rows // ROWS_A_BLOCK), 1), THREADS, arguments)
        return out
