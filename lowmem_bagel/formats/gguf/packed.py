"""Weights in GGUF's blocks made floats, or multiplied with one token as they are read: in PyTorch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checkpoint.gguf_blocks import BLOCK_TYPES, decoded


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
