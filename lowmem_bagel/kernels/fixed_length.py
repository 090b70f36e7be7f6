"""The fixed-length lossless form on the GPU: decoding at memory speed, and a matmul of few tokens that reads it.

`fixed_length.cu` and `fixed_length_tokens.cu` have the kernels; `fixed_length_packed.py` has the weight's form and the
references.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.linear import swiglu
from . import nvrtc
from .fixed_length_packed import Packed

if TYPE_CHECKING:
    from collections.abc import Callable

    Rows = Callable[[int, int], Tensor]

THREADS = 512
MAX_TOKENS = 16
"""Rows of activations up to which `FixedLengthKernels.matmul` is meant to be used; beyond, decode and multiply."""

_TOKENS_PER_LAUNCH = (1, 2, 4, 8)
_SEGMENT_TILES = 20
"""Tiles of a row that one block multiplies: few enough that staging the activations stays cheap."""
_STAGED_BYTES = 36 * 4 * 8
"""Shared memory that one row of activations takes for a tile (32 numbers of a lane are padded to 36)."""
_ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN, _RMS_NORM, _SWIGLU = 0, 1, 2

_TENSOR_CORES_OF_BF16 = (8, 0)
"""Compute capability."""
_MAX_WARPS, _GROUP_ROWS = 16, 16
"""Of the tensor-core matmul: warps of a block, and rows of the weight that one multiplies at a time."""
_CHUNK_GROUPS = 16
"""Groups of rows between two of its reductions, for one token."""


class FixedLengthKernels:
    """The kernels on one device. Calls are asynchronous on torch's current stream and can be captured in a graph.

    Scratch memory is made at the first call for a shape and kept, so one object serves one stream at a time. A weight
    must not be written by the kernel just ahead in the stream: GPUs that overlap kernels read it before that one ends.

    Args:
        load: compiles a .cu file of this folder; `nvrtc.load` for the device if None.

    Raises:
        CudaError: the kernels cannot be compiled; see `nvrtc.why_unavailable`.
    """

    def __init__(
        self,
        device: torch.device,
        load: Callable[[str], nvrtc.Module] | None = None,
        max_shared_bytes: int | None = None,
    ) -> None:
        load = load or partial(nvrtc.load, device=device)
        self.device = device
        self._module = load("fixed_length.cu")
        capable = device.type != "cuda" or torch.cuda.get_device_capability(device) >= _TENSOR_CORES_OF_BF16
        self._tokens_module = load("fixed_length_tokens.cu") if capable else None
        self._max_shared = nvrtc.max_shared_bytes(device) if max_shared_bytes is None else max_shared_bytes
        self._launches: dict[tuple[int, int, int], _Launch] = {}
        self._token_launches: dict[tuple[int, int, int, bool], _TokensLaunch] = {}

    def fuses(self, dtype: torch.dtype) -> bool:
        """Whether one kernel does a matmul of such activations and what follows it, SwiGLU or an addition."""
        return self._tokens_module is not None and dtype == torch.bfloat16

    def decode_into(self, weight: Packed, out: Tensor) -> None:
        """Write the bf16 weight [rows, cols] to `out`: bf16, contiguous, 16-byte aligned, any shape of that size."""
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous()
        assert out.numel() == weight.rows * weight.cols
        assert out.data_ptr() % 16 == 0
        kernel = self._module.kernel("decode_bf16")
        tiles_per_block = THREADS // 32 * 4
        blocks = min(-(-weight.rows * weight.tiles // tiles_per_block), 4 * kernel.resident_blocks(THREADS))
        kernel((blocks, 1), THREADS, [_weight(weight), out])

    def matmul(
        self,
        weight: Packed,
        x: Tensor,
        bias: Tensor | None = None,
        *,
        norm: tuple[Tensor, float] | None = None,
        gated: bool = False,
        activated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """x @ W.T + b with float32 accumulation; x: [..., cols] bf16, fp16 or fp32 -> [..., rows] of x's dtype.

        With `norm` = (weight, eps) it is rms_norm(x) that is multiplied, with `gated` swiglu(x) for x [..., 2 * cols].
        With `activated` the result is swiglu of that, [..., rows / 2]; `residual` [..., rows] is added to it. All are
        rounded as `model.linear` rounds them. Meant for up to MAX_TOKENS rows of x; more are done 8 at a time.
        """
        assert norm is None or not gated
        assert residual is None or not activated
        width = weight.cols * (2 if gated else 1)
        assert x.shape[-1] == width, (x.shape, width)
        assert all(t is None or (t.dtype == x.dtype and t.is_contiguous()) for t in (bias, norm and norm[0]))
        flat = x.reshape(-1, width).contiguous()
        fuses = self.fuses(x.dtype)
        rows = weight.rows // 2 if activated and fuses else weight.rows
        out = torch.empty(flat.shape[0], rows, dtype=x.dtype, device=x.device)
        added = None if residual is None else residual.reshape(-1, weight.rows).contiguous()
        for first in range(0, flat.shape[0], _TOKENS_PER_LAUNCH[-1]):
            part = slice(first, first + _TOKENS_PER_LAUNCH[-1])
            if fuses:
                more = None if added is None else added[part]
                self._multiply_tokens(weight, flat[part], bias, norm, gated, activated, more, out[part])
            else:
                self._multiply(weight, flat[part], bias, norm, gated, out[part])
        if not fuses:
            out = swiglu(out) if activated else out if added is None else added + out
        return out.view(*x.shape[:-1], out.shape[-1])

    def _multiply(
        self,
        weight: Packed,
        x: Tensor,
        bias: Tensor | None,
        norm: tuple[Tensor, float] | None,
        gated: bool,
        out: Tensor,
    ) -> None:
        tokens = _launched_tokens(x)
        key = (weight.rows, weight.tiles, tokens)
        if key not in self._launches:
            self._launches[key] = _Launch.plan(*key, self._module, self._max_shared, self.device)
        launch = self._launches[key]
        request = _Matmul(
            x=x.data_ptr(),
            norm_weight=norm[0].data_ptr() if norm else 0,
            bias=0 if bias is None else bias.data_ptr(),
            out=out.data_ptr(),
            partial=launch.partial.data_ptr(),
            arrived=launch.arrived.data_ptr(),
            eps=norm[1] if norm else 0.0,
            type=_ELEMENT_TYPES[x.dtype],
            prologue=_RMS_NORM if norm else _SWIGLU if gated else _PLAIN,
            m=x.shape[0],
            segment_tiles=launch.segment_tiles,
            chunk_rows=launch.chunk_rows,
        )
        launch.kernel(launch.grid, THREADS, [_weight(weight), request])

    def _multiply_tokens(
        self,
        weight: Packed,
        x: Tensor,
        bias: Tensor | None,
        norm: tuple[Tensor, float] | None,
        gated: bool,
        activated: bool,
        residual: Tensor | None,
        out: Tensor,
    ) -> None:
        assert self._tokens_module is not None
        key = (weight.rows, weight.tiles, _launched_tokens(x), activated)
        if key not in self._token_launches:
            plan = _TokensLaunch.plan(*key, self._tokens_module, self._max_shared, self.device)
            self._token_launches[key] = plan
        launch = self._token_launches[key]
        read = [x.data_ptr(), norm[0].data_ptr() if norm else 0]
        request = _Tokens(
            x=read[0],
            norm_weight=read[1],
            bias=0 if bias is None else bias.data_ptr(),
            residual=0 if residual is None else residual.data_ptr(),
            out=out.data_ptr(),
            partial=launch.partial.data_ptr(),
            arrived=launch.arrived.data_ptr(),
            eps=norm[1] if norm else 0.0,
            prologue=_RMS_NORM if norm else _SWIGLU if gated else _PLAIN,
            m=x.shape[0],
            wide=weight.cols % 8 == 0 and all(address % 16 == 0 for address in read),
            paired=activated,
            segment_tiles=launch.segment_tiles,
            chunk_groups=launch.chunk_groups,
        )
        launch.kernel(launch.grid, launch.threads, [_weight(weight), request], waits=True)


def _launched_tokens(x: Tensor) -> int:
    return next(n for n in _TOKENS_PER_LAUNCH if n >= x.shape[0])


@dataclass(frozen=True)
class _Launch:
    """How a matmul of one shape is cut into blocks: grid = (ranges of rows, segments of a row's tiles)."""

    kernel: Any
    grid: tuple[int, int]
    segment_tiles: int
    chunk_rows: int
    partial: Tensor
    arrived: Tensor

    @classmethod
    def plan(
        cls, rows: int, tiles: int, tokens: int, module: nvrtc.Module, max_shared: int, device: torch.device
    ) -> _Launch:
        chunk_rows = 64 // tokens
        per_tile = tokens * (_STAGED_BYTES + chunk_rows * 4)
        segment_tiles = min(_SEGMENT_TILES, (max_shared - _STATIC_SHARED) // per_tile)
        segments = -(-tiles // segment_tiles)
        segment_tiles = -(-tiles // segments)
        segments = -(-tiles // segment_tiles)
        kernel = module.kernel(f"matmul_{tokens}", segment_tiles * per_tile)
        ranges = max(1, min(rows, kernel.resident_blocks(THREADS) // segments))
        partial = torch.empty(segments * tokens * rows if segments > 1 else 0, dtype=torch.float32, device=device)
        arrived = torch.zeros(ranges, dtype=torch.int32, device=device)
        return cls(kernel, (ranges, segments), segment_tiles, chunk_rows, partial, arrived)


@dataclass(frozen=True)
class _TokensLaunch:
    """How a matmul on tensor cores is cut into blocks: grid = (ranges of rows, segments of a row's tiles)."""

    kernel: Any
    grid: tuple[int, int]
    threads: int
    segment_tiles: int
    chunk_groups: int
    partial: Tensor
    arrived: Tensor

    @classmethod
    def plan(
        cls,
        rows: int,
        tiles: int,
        tokens: int,
        activated: bool,
        module: nvrtc.Module,
        max_shared: int,
        device: torch.device,
    ) -> _TokensLaunch:
        for largest in range(min(tiles, _MAX_WARPS), 0, -1):
            segment_tiles = -(-tiles // -(-tiles // largest))
            sharing = _MAX_WARPS // segment_tiles
            chunk_groups = max(_CHUNK_GROUPS // tokens, 2 * sharing)
            staged = tokens * (segment_tiles * _STAGED_TOKEN_BYTES + _TOKEN_SHIFT_BYTES)
            shared = staged + chunk_groups * segment_tiles * tokens * _GROUP_ROWS * 4
            if shared <= max_shared - _STATIC_SHARED:
                break
        threads, segments = 32 * segment_tiles * sharing, -(-tiles // segment_tiles)
        kernel = module.kernel(f"tokens_{tokens}", shared)
        groups = -(-(rows // 2 if activated else rows) // _GROUP_ROWS)
        ranges = max(1, min(groups, kernel.resident_blocks(threads) // segments))
        partial = torch.empty(segments * tokens * rows if segments > 1 else 0, dtype=torch.float32, device=device)
        arrived = torch.zeros(ranges, dtype=torch.int32, device=device)
        return cls(kernel, (ranges, segments), threads, segment_tiles, chunk_groups, partial, arrived)


_STAGED_TOKEN_BYTES = 40 * 2 * 8
"""Shared memory that a token takes for a tile in bf16 (32 numbers of a lane are padded to 40), and once for all."""
_TOKEN_SHIFT_BYTES = 64
_STATIC_SHARED = 256
"""At least what the kernels declare beside the dynamic shared memory."""


class _Weight(ctypes.Structure):
    _fields_ = [
        ("signs", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("tile_starts", ctypes.c_void_p),
        ("escape_values", ctypes.c_void_p),
        ("escape_columns", ctypes.c_void_p),
        ("exponents", ctypes.c_void_p),
        ("rows", ctypes.c_uint32),
        ("cols", ctypes.c_uint32),
        ("tiles", ctypes.c_uint32),
    ]


class _Matmul(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("norm_weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_uint32),
        ("prologue", ctypes.c_uint32),
        ("m", ctypes.c_uint32),
        ("segment_tiles", ctypes.c_uint32),
        ("chunk_rows", ctypes.c_uint32),
    ]


class _Tokens(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("norm_weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("prologue", ctypes.c_uint32),
        ("m", ctypes.c_uint32),
        ("wide", ctypes.c_uint32),
        ("paired", ctypes.c_uint32),
        ("segment_tiles", ctypes.c_uint32),
        ("chunk_groups", ctypes.c_uint32),
    ]


def _weight(weight: Packed) -> _Weight:
    assert weight.sign_mantissa.data_ptr() % 16 == 0
    assert weight.exponents.data_ptr() % 8 == 0
    return _Weight(
        signs=weight.sign_mantissa.data_ptr(),
        index=weight.index.data_ptr(),
        tile_starts=weight.tile_starts.data_ptr(),
        escape_values=weight.escape_values.data_ptr(),
        escape_columns=weight.escape_columns.data_ptr(),
        exponents=weight.exponents.data_ptr(),
        rows=weight.rows,
        cols=weight.cols,
        tiles=weight.tiles,
    )
