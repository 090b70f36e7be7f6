"""Attention of one token of text in fp16 arithmetic, compiled by NVRTC: for cards that Triton does not serve.

`decode_attention.attend_token_reference` says what it computes.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ..model import token_attention
from ..model.decoder import Rope
from . import nvrtc
from .token_steps import THREADS, LoadModule

LANES = 32
MAX_DIM = 256


class _Token(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_uint64)
            for name in ("qkv", "q_norm", "k_norm", "cos", "sin", "position", "length", "k", "v", "out", "row", "head")
        ),
        ("heads", ctypes.c_uint32), ("kv_heads", ctypes.c_uint32), ("eps", ctypes.c_float), ("scale", ctypes.c_float),
    )  # fmt: skip


class CudaAttendToken:
    """Like `attend_token_reference`, without any wait for the device; graphs can capture it.

    Raises, when it is first called:
        CudaError: the kernel cannot be compiled.
    """

    def __init__(self, device: torch.device, load: LoadModule | None = None) -> None:
        self._load = load or (lambda source, defines=None: nvrtc.load(source, device, defines))
        self._modules: dict[int, Any] = {}

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
        """qkv, norms and tables are float32, the caches fp16, alike and with any strides but the last."""
        (_, kv_heads, d), (cos, sin) = k_cache.shape, tables
        heads = qkv.shape[-1] // d - 2 * kv_heads
        if d % LANES or d > MAX_DIM:  # a lane holds as many values of a head as another
            return token_attention.attend_token(qkv, q_norm, k_norm, eps, tables, position, k_cache, v_cache, length)
        assert all(t.dtype == torch.float32 and t.is_contiguous() for t in (qkv, q_norm, k_norm, cos, sin))
        assert k_cache.dtype == v_cache.dtype == torch.float16, "the caches are fp16"
        assert k_cache.stride() == v_cache.stride(), "keys and values are laid out differently"
        assert k_cache.stride(2) == 1, "rows have gaps"
        assert position.dtype == length.dtype == torch.int32, "position and length are int32 on the device"
        out = torch.empty(heads, d, dtype=torch.float32, device=qkv.device)
        places = (qkv, q_norm, k_norm, cos, sin, position, length, k_cache, v_cache, out)
        given = _Token(
            *(t.data_ptr() for t in places), k_cache.stride(0), k_cache.stride(1), heads, kv_heads, eps, d**-0.5
        )
        if d not in self._modules:
            self._modules[d] = self._load("attend_token.cu", defines={"DIM": d})
        self._modules[d].kernel("attend_token")((heads, 1), THREADS, [given])
        return out
