"""NF4 weights made halves, or multiplied with one token as they are read: in PyTorch's operations and by CUDA kernels.

NVRTC compiles the kernels for any card; they need no tensor cores.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...kernels.cuda_source import ROWS_A_BLOCK, THREADS, CudaSource, conversion_grid
from .codec import dequantize
from .levels import CODEBOOK

MULTIPLE = 32
"""What rows must be a multiple of to be multiplied with one token: 16 bytes are read at a time."""


class Levels(ctypes.Structure):
    """`Levels` of packed.cu."""

    _fields_ = (("of", ctypes.c_float * 16),)


class PackedNf4:
    """The reference. half: the dtype of what weights are made."""

    compiled = False

    def __init__(self, half: torch.dtype) -> None:
        self.half = half

    def to_half(self, weight: Tensor, absmax: Tensor) -> Tensor:
        """uint8 [N, K / 2], float32 [N, K / 64] -> half [N, K]: `codec.dequantize`."""
        return dequantize(weight, absmax, self.half)

    def times_token(self, token: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
        """token fp16 [1, K] @ weight.T, float32 [1, N]."""
        return token.float() @ dequantize(weight, absmax, torch.float32).t()


class CudaPackedNf4(PackedNf4):
    """By our kernels, where the weight's place in memory allows it."""

    compiled = True

    def __init__(self, source: CudaSource) -> None:
        super().__init__(source.half)
        self._source, self._levels = source, Levels((ctypes.c_float * 16)(*CODEBOOK))

    def to_half(self, weight: Tensor, absmax: Tensor) -> Tensor:
        if weight.data_ptr() % 4:
            return super().to_half(weight, absmax)
        assert weight.is_contiguous(), "the weight must be contiguous"
        assert absmax.is_contiguous(), "the scales must be contiguous"
        rows, half_width = weight.shape
        out = torch.empty(rows, 2 * half_width, dtype=self.half, device=weight.device)
        words = weight.numel() // 4
        arguments = [weight, absmax, out, ctypes.c_uint64(words), self._levels]
        self._source.kernel("formats/nf4/packed.cu", "nf4_to_half")(conversion_grid(words), THREADS, arguments)
        return out

    def times_token(self, token: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
        (_, width), rows = token.shape, len(weight)
        if width % MULTIPLE or weight.data_ptr() % 16:
            return super().times_token(token, weight, absmax)
        assert token.dtype == torch.float16, "a token is scaled to fp16 before"
        assert weight.is_contiguous(), "the weight must be contiguous"
        out = torch.empty(1, rows, dtype=torch.float32, device=weight.device)
        arguments = [token, weight, absmax, out, ctypes.c_uint32(rows), ctypes.c_uint32(width), self._levels]
        self._source.kernel("formats/nf4/packed.cu", "nf4_times_token")(
            (-(-rows // ROWS_A_BLOCK), 1), THREADS, arguments
        )
        return out
