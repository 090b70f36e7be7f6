"""The steps around matmuls for cards without bfloat16, or without Triton, each in one pass over memory.

NVRTC compiles them, and they need no tensor cores: `prologues.cu` and `epilogues.cu` are for any card.
`ops.elementwise.Elementwise` is the reference, and says what each step computes.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..ops.elementwise import MAX_SHIFT, Elementwise, Scaled
from ..ops.rope import Projected, Rope
from .cuda_source import THREADS, CudaSource

WIDE_THREADS, WIDE_FROM = 1024, 8192
"""Threads that hold a row in their registers, and the width from which they are more."""
VALUES_A_THREAD = 4


class _Input(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_uint64), ("norm", ctypes.c_uint64), ("stride", ctypes.c_uint64), ("width", ctypes.c_uint32),
        ("type", ctypes.c_uint32), ("fours", ctypes.c_uint32), ("eps", ctypes.c_float),
    )  # fmt: skip


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("values", "back", "columns", "bias")),
        *((name, ctypes.c_uint32) for name in ("width", "integers", "fours")),
    )


class _Heads(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("qkv", "q_norm", "k_norm", "cos", "sin", "q", "k", "v")),
        *(
            (name, ctypes.c_uint64)
            for name in ("rope_batch", "rope_token", "q_batch", "q_token", "kv_batch", "kv_token", "kv_head")
        ),
        *((name, ctypes.c_uint32) for name in ("heads", "kv_heads", "d")),
        ("eps", ctypes.c_float),
    )


class CudaElementwise(Elementwise):
    """What the reference does, by our kernels. Each is launched on torch's current stream; graphs can capture it.

    Raises, when a kernel is first used:
        CudaError: it cannot be compiled.
    """

    name = "CUDA kernels"
    compiled = True

    def __init__(self, source: CudaSource) -> None:
        super().__init__(source.half)
        self._source = source

    def rms_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=self.wide, device=x.device)
        self._prologue("rms_norm", x, norm, eps, out)
        return out

    def swiglu(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        assert gate_up.dtype == self.wide, "what surrounds matmuls is wide"
        assert gate_up.is_contiguous(), "the activations have gaps"
        out = torch.empty(rows, width, dtype=self.wide, device=gate_up.device)
        fours = width % 4 == 0 and gate_up.data_ptr() % 16 == 0
        if rows:
            arguments = [gate_up, out, ctypes.c_uint32(width), ctypes.c_uint32(fours)]
            self._source.kernel("kernels/epilogues.cu", "swiglu")(_grid(rows, width), THREADS, arguments)
        return out

    def to_fp16(self, x: Tensor, exponent: int, norm: Tensor | None = None, eps: float = 0.0) -> Scaled:
        values, back = _empty(x, torch.float16)
        limits = ctypes.c_int32(exponent), ctypes.c_int32(MAX_SHIFT)
        self._prologue("to_fp16", x, norm, eps, values, back, *limits)
        return values, back

    def to_int8(self, x: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Scaled:
        values, back = _empty(x, torch.int8)
        self._prologue("to_int8", x, norm, eps, values, back)
        return values, back

    def epilogue(self, product: Tensor, back: Tensor, columns: Tensor | None, bias: Tensor | None) -> Tensor:
        out = product.view(torch.float32) if self.wide == torch.float32 else torch.empty_like(product, dtype=self.wide)
        self._epilogue("epilogue", product, back, columns, bias, out)
        return out

    def epilogue_add(
        self, residual: Tensor, product: Tensor, back: Tensor, columns: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        assert residual.shape == product.shape, "the residual does not fit the product"
        self._epilogue("epilogue_add", product, back, columns, bias, residual)
        return residual

    def epilogue_swiglu(self, product: Tensor, back: Tensor, columns: Tensor | None, bias: Tensor | None) -> Tensor:
        rows, width = product.shape
        out = torch.empty(rows, width // 2, dtype=self.wide, device=product.device)
        self._epilogue("epilogue_swiglu", product, back, columns, bias, out)
        return out

    def rotate(
        self,
        qkv: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        eps: float,
        rope: Rope,
        heads: int,
        kv_heads: int,
        into: Projected,
    ) -> None:
        """`ops.rope.qk_norm_rope` of a wide qkv into q, k and v of half, of any strides but the last two of q."""
        batch, length, width = qkv.shape
        d, (q, k, v) = width // (heads + 2 * kv_heads), into
        assert qkv.is_contiguous(), "the projection has gaps"
        assert (qkv.dtype, q_norm.dtype, k_norm.dtype) == (self.wide,) * 3, "what surrounds matmuls is wide"
        assert (q.dtype, k.dtype, v.dtype) == (self.half,) * 3, "attention is in half"
        assert q.shape == (batch, length, heads, d), "the room for q does not fit the block"
        assert k.shape == v.shape == (batch, length, kv_heads, d), "the room for k and v does not fit the block"
        cos, sin = (table.expand(batch, length, 1, d) for table in rope)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == cos.stride(-1) == 1, "rows have gaps"
        assert cos.stride() == sin.stride(), "cos and sin are laid out differently"
        assert k.stride() == v.stride(), "keys and values are laid out differently"
        assert q.stride(2) == d, "the heads of a query have gaps"
        places = (tensor.data_ptr() for tensor in (qkv, q_norm, k_norm, cos, sin, q, k, v))
        strides = (*cos.stride()[:2], *q.stride()[:2], *k.stride()[:3])
        arguments = _Heads(*places, *strides, heads, kv_heads, d, eps)
        if length:
            self._source.kernel("kernels/epilogues.cu", "rotate")((length, batch), THREADS, [arguments])

    def _prologue(
        self, kernel: str, x: Tensor, norm: Tensor | None, eps: float, *results: Tensor | ctypes.c_int32
    ) -> None:
        rows, width = x.shape
        if rows == 0:
            return
        assert x.dtype in (self.wide, torch.float16), "an activation is wide or fp16"
        x = x if x.stride(1) == 1 else x.contiguous()
        fours = width % 4 == 0 and x.stride(0) % 4 == 0 and x.data_ptr() % 16 == 0
        if norm is not None:
            assert (norm.dtype, norm.shape) == (self.wide, (width,)), "the norm's weight does not fit the row"
            fours = fours and norm.data_ptr() % 16 == 0
        given = _Input(
            x.data_ptr(), _address(norm), x.stride(0), width, int(x.dtype == torch.float16), int(fours), eps
        )  # fmt: skip
        threads = WIDE_THREADS if width >= WIDE_FROM else THREADS
        sizes = {"THREADS": threads, "QUADS": -(-width // (VALUES_A_THREAD * threads))}
        self._source.kernel("kernels/prologues.cu", kernel, **sizes)((rows, 1), threads, [given, *results])

    def _epilogue(
        self, kernel: str, product: Tensor, back: Tensor, columns: Tensor | None, bias: Tensor | None, out: Tensor
    ) -> None:
        rows, width = product.shape
        assert product.dtype in (torch.float32, torch.int32), "a product is float32 or int32"
        assert product.is_contiguous(), "the product has gaps"
        assert out.is_contiguous(), "the result has gaps"
        assert back.numel() == rows, "the tokens' scales do not fit"
        assert columns is None or (columns.dtype, columns.shape) == (torch.float32, (width,)), "columns do not fit"
        assert bias is None or (bias.dtype, bias.shape) == (self.wide, (width,)), "the bias does not fit"
        assert out.dtype == self.wide, "a result is wide"
        places = [tensor for tensor in (product, out, columns, bias) if tensor is not None]
        fours = out.shape[1] % 4 == 0 and all(place.data_ptr() % 16 == 0 for place in places)
        given = _Product(
            product.data_ptr(), back.data_ptr(), _address(columns), _address(bias), width,
            int(product.dtype == torch.int32), int(fours),
        )  # fmt: skip
        if rows:
            self._source.kernel("kernels/epilogues.cu", kernel)(_grid(rows, out.shape[1]), THREADS, [given, out])


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, -(-width // (VALUES_A_THREAD * THREADS))


def _empty(x: Tensor, dtype: torch.dtype) -> Scaled:
    return torch.empty(x.shape, dtype=dtype, device=x.device), torch.empty(len(x), dtype=torch.float32, device=x.device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
