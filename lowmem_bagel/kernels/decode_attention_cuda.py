"""Attention of one token of text, compiled by NVRTC: for cards without bfloat16, or without Triton.

`decode_attention.attend_token_reference` says what it computes.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..ops import decode_attention as token_attention
from ..ops.dtypes import wide
from ..ops.rope import Rope
from .cuda_source import CudaSource

WARP = 32
GRAIN, MAX_DIM = 32, 128
"""A head's size is a multiple of the one up to the other: four lanes of a warp share it, eight values at a time."""
MAX_GROUP = 32
"""Query heads of a key/value head: a block has a warp for each."""
PARTS = 32
"""Parts of the cache, whatever its length: one captured graph serves every step."""


class _Token(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_uint64)
            for name in (
                "qkv", "q_norm", "k_norm", "cos", "sin", "position", "length", "k", "v", "sums", "weights", "largest",
                "row", "head",
            )
        ),
        ("heads", ctypes.c_uint32), ("kv_heads", ctypes.c_uint32), ("eps", ctypes.c_float), ("scale", ctypes.c_float),
    )  # fmt: skip


class CudaAttendToken:
    """Like `attend_token_reference`, without any wait for the device; graphs can capture it.

    Raises, when it is first called:
        CudaError: the kernel cannot be compiled.
    """

    def __init__(self, source: CudaSource) -> None:
        self.half, self.wide = source.half, wide(source.half)
        self._source = source

    def __call__(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        tables: Rope,
        position: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        length: Tensor,
    ) -> Tensor:
        """qkv and norms are wide, tables float32, the caches half and alike; rows begin at multiples of 16 bytes."""
        (_, kv_heads, d), (cos, sin) = k_cache.shape, tables
        heads = qkv.shape[-1] // d - 2 * kv_heads
        group = heads // kv_heads
        if d % GRAIN or d > MAX_DIM or group > MAX_GROUP:
            return token_attention.attend_token(qkv, q_norm, k_norm, eps, tables, position, k_cache, v_cache, length)
        assert all(t.dtype == self.wide and t.is_contiguous() for t in (qkv, q_norm, k_norm))
        assert all(t.dtype == torch.float32 and t.is_contiguous() for t in (cos, sin))
        assert k_cache.dtype == v_cache.dtype == self.half, "the caches are half"
        assert k_cache.stride() == v_cache.stride(), "keys and values are laid out differently"
        assert k_cache.stride(2) == 1, "rows have gaps"
        assert all(n % 8 == 0 for n in k_cache.stride()[:2]), "rows begin at multiples of 16 bytes"
        assert k_cache.data_ptr() % 16 == v_cache.data_ptr() % 16 == 0, "rows begin at multiples of 16 bytes"
        assert position.dtype == length.dtype == torch.int32, "position and length are int32 on the device"
        sums = torch.empty(heads, PARTS, d, dtype=torch.float32, device=qkv.device)
        weights, largest = torch.empty(2, heads, PARTS, dtype=torch.float32, device=qkv.device)
        out = torch.empty(heads, d, dtype=self.wide, device=qkv.device)
        places = (qkv, q_norm, k_norm, cos, sin, position, length, k_cache, v_cache, sums, weights, largest)
        strides = k_cache.stride()[:2]
        given = _Token(*(t.data_ptr() for t in places), *strides, heads, kv_heads, eps, d**-0.5)
        sizes, joining = {"DIM": d, "GROUP": group}, [sums, weights, largest, out, ctypes.c_uint32(PARTS)]
        self._source.kernel("kernels/attend_token.cu", "attend_token", **sizes)(
            (kv_heads, PARTS), group * WARP, [given]
        )
        self._source.kernel("kernels/attend_token.cu", "join_parts", **sizes)((heads, 1), d, joining)
        return out
