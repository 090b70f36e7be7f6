"""The INT8 matmul of many tokens by pairs of blocks that share what they fetch: for Hopper, compiled by NVRTC.

Triton's kernel for these cards multiplies by 128 rows of the weight an instruction, waits for the tensor cores after
every step of the depth, and reads every operand from the cache once a tile. This one (`clusters.cu`) does none of the
three, and writes SwiGLU of a product in its place. All results have the bits of Triton's kernels.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from ...kernels.cuda_source import CudaSource
from ...kernels.triton_language import ceil_div
from ...ops.linear import Weights

SOURCE = "formats/int8/clusters.cu"
LEAST_TOKENS = 1024
"""Fewer are left to tiles that are chosen by measuring."""
THREADS, BLOCKS = 384, 2
TILE_M, TILE_N, DEPTH, STAGES = 128, 256, 128, 4
SHARED_BYTES = 1024 + STAGES * (TILE_M + TILE_N) * DEPTH + 2 * STAGES * 8
"""Stages from a multiple of 1024 bytes on, and two barriers for each."""
KINDS = ({"SWIGLU": 0, "BIAS": 1, "ADDS": 0}, {"SWIGLU": 0, "BIAS": 0, "ADDS": 1}, {"SWIGLU": 1, "BIAS": 0, "ADDS": 0})
"""What the decoder's linears are: qkv, o and down, gate_up."""


class TensorMap(ctypes.Structure):
    """What bulk copies of boxes of a matrix go by; at a multiple of 64 bytes where the driver fills it."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


class Pairs:
    """For one arithmetic on one card."""

    def __init__(self, source: CudaSource, processors: int) -> None:
        self.processors = processors
        self._source = source

    def compile(self) -> None:
        """What the decoder's linears need, at the same time.

        Raises:
            CudaError: it does not compile.
        """
        with ThreadPoolExecutor(len(KINDS)) as pool:
            list(pool.map(self._kernel, KINDS))

    def takes(self, tokens: int, weights: Weights, dtype: torch.dtype, activates: bool = False) -> bool:
        """Whether these products are computed here: rows and columns must be whole pieces of 16 bytes."""
        (n, k), bias = weights.weight.shape, weights.bias
        whole = k % 16 == 0 and n % (16 if activates else 8) == 0 and weights.weight.data_ptr() % 16 == 0
        scales = weights.scales is not None and weights.scales.data_ptr() % 8 == 0
        biased = bias is None or (bias.dtype == dtype and bias.data_ptr() % 4 == 0)
        return tokens >= LEAST_TOKENS and dtype == self._source.half and whole and scales and biased

    def multiply(
        self, values: Tensor, token_scale: Tensor, weights: Weights, residual: Tensor | None = None,
        activates: bool = False,
    ) -> Tensor:  # fmt: skip
        """values int8 [M, K], token_scale fp32 [M] -> [M, N] of the arithmetic's half, as `kernels.int8_matmul`.

        residual: [M, N], contiguous; the result, rounded, is added to it where it lies. activates: the weight is
        [gate | up], and the result is silu(gate) * up, [M, N / 2], rounded where SwiGLU of the product rounds.
        """
        (m, k), (rows, _) = values.shape, weights.weight.shape
        n = rows // 2 if activates else rows
        assert values.is_contiguous() and weights.weight.is_contiguous(), "operands have gaps"
        assert weights.scales is not None
        assert (token_scale.numel(), weights.scales.numel()) == (m, rows), "the scales do not fit"
        assert not (activates and residual is not None), "nothing is added to what is activated"
        out = torch.empty(m, n, dtype=self._source.half, device=values.device) if residual is None else residual
        assert (out.shape, out.dtype, out.is_contiguous()) == ((m, n), self._source.half, True), "the room does not fit"
        tiles = ceil_div(m, BLOCKS * TILE_M) * ceil_div(n, TILE_N // (2 if activates else 1))
        bias = weights.scales if weights.bias is None else weights.bias
        kind = {"SWIGLU": int(activates), "BIAS": int(weights.bias is not None), "ADDS": int(residual is not None)}
        maps = (tensor_map(one.data_ptr(), *one.shape) for one in (values, weights.weight))
        numbers = (ctypes.c_uint32(number) for number in (m, n, k))
        grid = BLOCKS * min(self.processors // BLOCKS, tiles), 1
        self._kernel(kind)(grid, THREADS, [*maps, token_scale, weights.scales, bias, out, *numbers])
        return out

    def _kernel(self, kind: dict[str, int]) -> Any:
        return self._source.kernel(SOURCE, "int8_clusters", shared_bytes=SHARED_BYTES, **kind)


@lru_cache(maxsize=4096)
def tensor_map(address: int, rows: int, width: int) -> TensorMap:
    """Of a matrix of bytes, in boxes of 128 rows by 128 bytes, laid down swizzled; what is beyond its ends is zero.

    Raises:
        RuntimeError: the driver refuses.
    """
    raw = (ctypes.c_char * (ctypes.sizeof(TensorMap) + 64))()
    made = TensorMap.from_buffer(raw, -ctypes.addressof(raw) % 64)
    u32, u64 = ctypes.c_uint32, ctypes.c_uint64
    box, steps = (u32 * 2)(DEPTH, TILE_M), (u32 * 2)(1, 1)
    bytes_, no_interleave, by_128, by_256, zeros = 0, 0, 3, 3, 0  # as the driver's header numbers them
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.byref(made), bytes_, u32(2), ctypes.c_void_p(address), (u64 * 2)(width, rows), (u64 * 1)(width), box,
        steps, no_interleave, by_128, by_256, zeros,
    )  # fmt: skip
    if status != 0:
        raise RuntimeError(f"cuTensorMapEncodeTiled failed ({status}) for {rows}x{width} at {address:#x}")
    return made


@cache
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def results(pairs: Pairs, operands: Sequence[Tensor]) -> list[Tensor]:
    """Of a trial: each kind of product. operands: values, token_scale, weight, row_scale, bias, residual."""
    values, token_scale, weight, row_scale, bias, residual = operands
    plain = Weights(weight, row_scale)
    return [
        pairs.multiply(values, token_scale, Weights(weight, row_scale, bias)),
        pairs.multiply(values, token_scale, plain, residual.clone()),
        pairs.multiply(values, token_scale, plain, activates=True),
    ]
