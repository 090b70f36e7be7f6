"""W8A8: int8 weights times activations quantised per token, with scales and bias applied as the result is written.

    y[m, n] = sum_k a[m, k] * w[n, k]  (exact, int32)  * row_scale[n] * token_scale[m] + bias[n]

in float32, rounded once to the output's dtype. Two kernels do the same: one whose programs stay on their
multiprocessor and fetch tiles with Hopper's bulk copies (TMA), and a plain one for other cards and odd shapes.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from functools import partial

import torch
from torch import Tensor

from ...kernels import elementwise as fused
from ...kernels.elementwise import rounded
from ...kernels.gemv import gemv, gemv_options
from ...kernels.grouped_matmul import add_slots
from ...kernels.tiles import tile_origin
from ...kernels.triton_language import TensorDescriptor, ceil_div, jit, tl
from ...ops.int8 import int_mm
from ...ops.linear import Add, After, Before, Product, RMSNorm, Rows, SwiGLU, Weights, count_tokens, joined
from ...ops.routed import Groups, Routes
from .grouped import int8_grouped
from .pairs import LEAST_TOKENS, Pairs
from .tiles import Tile, Tiles

UNQUANTIZED_TOKENS = 1
"""Up to so many tokens the weight is multiplied as it is. From two on, tensor cores hide behind reading it and CUDA
cores do not, as tried on an H200 at BAGEL-7B's shapes with 1, 2, 4 and 8 tokens."""


def int8_matmul_reference(
    values: Tensor, token_scale: Tensor, weight: Tensor, row_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """values int8 [M, K], token_scale fp32 [M], weight int8 [N, K], row_scale fp32 [N], bias [N] -> dtype [M, N]."""
    product = int_mm(values, weight).float() * row_scale * token_scale[:, None]
    return (product if bias is None else product + bias.float()).to(dtype)


def int8_matmul(
    values: Tensor,
    token_scale: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile,
    processors: int,
    residual: Tensor | None = None,
) -> Tensor:
    """Like `int8_matmul_reference`. `processors`: multiprocessors of the device, for the persistent kernel.

    residual: dtype [M, N], contiguous; the result, rounded, is added to it where it lies.
    """
    m, k = values.shape
    n = weight.shape[0]
    assert weight.shape[1] == k, "the weight's row does not fit the input"
    assert (token_scale.numel(), row_scale.numel()) == (m, n), "the scales do not fit"
    assert values.is_contiguous(), "the activation must be contiguous"
    assert weight.is_contiguous(), "the weight must be contiguous"
    out = torch.empty(m, n, dtype=dtype, device=values.device) if residual is None else residual
    assert out.is_contiguous(), "the residual must be contiguous"
    assert (out.shape, out.dtype) == ((m, n), dtype), "the residual does not fit the result"
    tiles = ceil_div(m, tile.m) * ceil_div(n, tile.n)
    # The result passes through shared memory, beside the stages; four bytes a value leave room for one stage less.
    stages = tile.stages - (1 if tile.bulk and dtype.itemsize == 4 else 0)
    operands = (out, token_scale, row_scale, row_scale if bias is None else bias, m, n)
    options = {
        "K": k, "HAS_BIAS": bias is not None, "ADDS": residual is not None,
        "TILE_M": tile.m, "TILE_N": tile.n, "TILE_K": tile.k, "GROUP": 16 if tile.bulk else 8,
        "num_warps": tile.warps, "num_stages": stages,
    }  # fmt: skip
    if tile.bulk:
        a = TensorDescriptor.from_tensor(values, [tile.m, tile.k])
        b = TensorDescriptor.from_tensor(weight, [tile.n, tile.k])
        bulk_stores = residual is None and n * dtype.itemsize % 16 == 0
        target = TensorDescriptor.from_tensor(out, [tile.m, tile.n // 2]) if bulk_stores else out
        _bulk_matmul[(min(processors, tiles),)](a, b, target, *operands, BULK_STORES=bulk_stores, **options)
    else:
        _plain_matmul[(tiles,)](values, weight, *operands, **options)
    return out


class TritonInt8(Product):
    """The INT8 linear's arithmetic on a card with int8 tensor cores.

    More than UNQUANTIZED_TOKENS: W8A8. One token: the weight is read once and multiplied as it is, without quantizing
    the activation, because such a product takes as long as reading the weight. groups: whether the kernels of routed
    experts run; their activations are always quantized. pairs: what multiplies many tokens, where it runs.
    """

    def __init__(self, tiles: Tiles, groups: bool = False, pairs: Pairs | None = None) -> None:
        self.tiles, self.groups, self.pairs = tiles, groups, pairs

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        first = x if isinstance(x, Tensor) else x[0]
        tokens = count_tokens(x)
        if tokens <= UNQUANTIZED_TOKENS:
            options = gemv_options(before, after)
            return gemv(joined(x), weights.weight, scale=weights.scales, bias=weights.bias, **options)
        dtype = before.weight.dtype if isinstance(before, RMSNorm) else first.dtype
        activation, shape = fused.quantized(x, before), (-1, *first.shape[1:-1], weights.weight.shape[0])
        if isinstance(after, Add) and after.residual.dtype == dtype and after.residual.is_contiguous():
            residual = after.residual.view(tokens, -1)
            return self._multiply(activation, dtype, weights, residual).view(after.residual.shape)
        if isinstance(after, SwiGLU) and self.pairs is not None and self.pairs.takes(tokens, weights, dtype, True):
            return self.pairs.multiply(*activation, weights, activates=True).view(*shape[:-1], shape[-1] // 2)
        y = self._multiply(activation, dtype, weights).view(shape)
        if after is None:
            return y
        return fused.swiglu_fused(y) if isinstance(after, SwiGLU) else after(y)

    def prepared(self, x: Tensor, before: Before) -> Tensor:
        return fused.normalized(x, before)

    def grouped(self, x: Tensor, weights: Weights, groups: Groups, before: Before = None) -> Tensor:
        if not self.groups:
            return super().grouped(x, weights, groups, before)
        assert weights.scales is not None
        return int8_grouped(*fused.quantized(x, before), weights.weight, weights.scales, groups, x.dtype)

    def add_slots(self, residual: Tensor, slots: Tensor, routes: Routes) -> Tensor:
        return (add_slots if self.groups else super().add_slots)(residual, slots, routes)

    def fuses(self, tokens: int, before: Before, after: After) -> bool:
        return isinstance(after, SwiGLU) and (tokens == 1 or (self.pairs is not None and tokens >= LEAST_TOKENS))

    def _multiply(
        self, activation: fused.Quantized, dtype: torch.dtype, weights: Weights, residual: Tensor | None = None
    ) -> Tensor:
        values, token_scale = activation
        weight, scales, bias = weights
        if self.pairs is not None and self.pairs.takes(len(values), weights, dtype):
            return self.pairs.multiply(values, token_scale, weights, residual)
        assert scales is not None
        n, k = weight.shape
        tile = self.tiles.choose(values.shape[0], n, k)
        return int8_matmul(values, token_scale, weight, scales, bias, dtype, tile, self.tiles.processors, residual)


@jit
def _scaled(
    acc, token_scale_ptr, row_scale_ptr, bias_ptr, start_m, start_n, m, n,
    HAS_BIAS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    rows, columns = start_m + tl.arange(0, TILE_M), start_n + tl.arange(0, TILE_N)
    token_scale = tl.load(token_scale_ptr + rows, mask=rows < m, other=0)
    row_scale = tl.load(row_scale_ptr + columns, mask=columns < n, other=0)
    value = acc.to(tl.float32) * row_scale[None, :] * token_scale[:, None]
    if HAS_BIAS:
        value += tl.load(bias_ptr + columns, mask=columns < n, other=0).to(tl.float32)[None, :]
    return value


@jit
def _store(
    value, out_ptr, start_m, start_n, m, n, ADDS: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr
):  # fmt: skip
    rows, columns = start_m + tl.arange(0, TILE_M), start_n + tl.arange(0, TILE_N)
    target = out_ptr + rows.to(tl.int64)[:, None] * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    if ADDS:
        value = rounded(value, out_ptr) + tl.load(target, mask=inside, other=0).to(tl.float32)
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=inside)


@partial(jit, varying=["m"])
def _plain_matmul(
    a_ptr, b_ptr, out_ptr, token_scale_ptr, row_scale_ptr, bias_ptr, m, n,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    start_m, start_n = tile_origin(tl.program_id(0), m, n, TILE_M, TILE_N, GROUP)
    # Rows beyond the edge read the last row again: cheaper than a mask, and their results are not stored.
    rows = tl.minimum(start_m + tl.arange(0, TILE_M), m - 1)
    columns = tl.minimum(start_n + tl.arange(0, TILE_N), n - 1)
    depth = tl.arange(0, TILE_K)
    a = a_ptr + rows.to(tl.int64)[:, None] * K + depth[None, :]
    b = b_ptr + columns.to(tl.int64)[None, :] * K + depth[:, None]
    acc = tl.zeros((TILE_M, TILE_N), dtype=tl.int32)
    for start in range(0, K, TILE_K):
        if K % TILE_K == 0:
            left, right = tl.load(a), tl.load(b)
        else:
            left = tl.load(a, mask=(depth < K - start)[None, :], other=0)
            right = tl.load(b, mask=(depth < K - start)[:, None], other=0)
        acc = tl.dot(left, right, acc, out_dtype=tl.int32)
        a += TILE_K
        b += TILE_K
    value = _scaled(acc, token_scale_ptr, row_scale_ptr, bias_ptr, start_m, start_n, m, n, HAS_BIAS, TILE_M, TILE_N)
    _store(value, out_ptr, start_m, start_n, m, n, ADDS, TILE_M, TILE_N)


@partial(jit, varying=["m"])
def _bulk_matmul(
    a, b, target, out_ptr, token_scale_ptr, row_scale_ptr, bias_ptr, m, n,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, BULK_STORES: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The result is stored half a tile at a time, since a whole one passing through shared memory would leave no room
    for a stage; by bulk copies too, unless a residual is added."""
    tiles = tl.cdiv(m, TILE_M) * tl.cdiv(n, TILE_N)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        start_m, start_n = tile_origin(index, m, n, TILE_M, TILE_N, GROUP)
        acc = tl.zeros((TILE_M, TILE_N), dtype=tl.int32)
        for start in range(0, K, TILE_K):
            acc = tl.dot(a.load([start_m, start]), b.load([start_n, start]).T, acc, out_dtype=tl.int32)
        value = _scaled(acc, token_scale_ptr, row_scale_ptr, bias_ptr, start_m, start_n, m, n, HAS_BIAS, TILE_M, TILE_N)
        left, right = value.reshape(TILE_M, 2, TILE_N // 2).permute(0, 2, 1).split()
        if BULK_STORES:
            target.store([start_m, start_n], left.to(target.dtype))
            target.store([start_m, start_n + TILE_N // 2], right.to(target.dtype))
        else:
            _store(left, out_ptr, start_m, start_n, m, n, ADDS, TILE_M, TILE_N // 2)
            _store(right, out_ptr, start_m, start_n + TILE_N // 2, m, n, ADDS, TILE_M, TILE_N // 2)
