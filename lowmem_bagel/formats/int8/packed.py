"""INT8 weights made halves, or multiplied with one token as they are read: in PyTorch's operations and by CUDA kernels.

NVRTC compiles the kernels for any card; they need no tensor cores.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...kernels.cuda_source import ROWS_A_BLOCK, THREADS, CudaSource, conversion_grid

INTEGERS_DOWN = 2.0**-12
"""Makes integers about as large as weights are, for which the exponents of a matmul's activations are chosen, and keeps
them in float16's normal range: exact."""
MULTIPLE = 16
"""What rows must be a multiple of to be multiplied with one token: 16 bytes are read at a time."""


class PackedInt8:
    """The reference. half: the dtype of what weights are made."""

    compiled = False

    def __init__(self, half: torch.dtype) -> None:
        self.half = half

    def to_half(self, weight: Tensor) -> Tensor:
        """int8 [N, K] -> half, times INTEGERS_DOWN."""
        return weight.to(self.half).mul_(INTEGERS_DOWN)

    def times_token(self, token: Tensor, weight: Tensor) -> Tensor:
        """token fp16 [1, K] @ weight.T for int8 [N, K] without scales, float32 [1, N]."""
        return token.float() @ weight.float().t()


class CudaPackedInt8(PackedInt8):
    """By our kernels, where the weight's place in memory allows it."""

    compiled = True

    def __init__(self, source: CudaSource) -> None:
        super().__init__(source.half)
        self._source = source

    def to_half(self, weight: Tensor) -> Tensor:
        if weight.numel() % 4 or weight.data_ptr() % 4:
            return super().to_half(weight)
        assert weight.is_contiguous(), "the weight must be contiguous"
        out = torch.empty(weight.shape, dtype=self.half, device=weight.device)
        words = weight.numel() // 4
        arguments = [weight, out, ctypes.c_uint64(words), ctypes.c_float(INTEGERS_DOWN)]
        self._source.kernel("formats/int8/packed.cu", "int8_to_half")(conversion_grid(words), THREADS, arguments)
        return out

    def times_token(self, token: Tensor, weight: Tensor) -> Tensor:
        (_, width), rows = token.shape, len(weight)
        if width % MULTIPLE or weight.data_ptr() % 16:
            return super().times_token(token, weight)
        assert token.dtype == torch.float16, "a token is scaled to fp16 before"
        assert weight.is_contiguous(), "the weight must be contiguous"
        out = torch.empty(1, rows, dtype=torch.float32, device=weight.device)
        arguments = [token, weight, out, ctypes.c_uint32(rows), ctypes.c_uint32(width)]
        self._source.kernel("formats/int8/packed.cu", "int8_times_token")(
            (-(-rows // ROWS_A_BLOCK), 1), THREADS, arguments
        )
        return out
