"""W8A8 products of routed experts: as in `kernels`, each group of tokens by its own part of a stacked weight."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from functools import partial

import torch
from torch import Tensor

from ...kernels.grouped_matmul import GroupTile, group_arguments, group_options, group_tile, launch, tile_for
from ...kernels.tiles import tile_origin
from ...kernels.triton_language import jit, tl
from ...ops.int8 import int_mm
from ...ops.linear import Weights, part_of
from ...ops.routed import Groups

FEW, SOME, MANY = GroupTile(16, 64, 128, 4, 4), GroupTile(64, 128, 64, 4, 4), GroupTile(128, 128, 128, 8, 3)
TILES = (FEW, SOME, MANY)


def int8_grouped_reference(
    values: Tensor, token_scale: Tensor, weight: Tensor, row_scale: Tensor, groups: Groups, dtype: torch.dtype
) -> Tensor:
    """values int8 [rows, K], token_scale fp32 [rows], weight int8 [parts * N, K], row_scale fp32 [parts * N] -> dtype
    [slots, N]."""
    found, bounds = [], groups.offsets.tolist()
    for number in range(groups.parts):
        slots = torch.arange(bounds[number], bounds[number + 1], device=values.device)
        rows = slots if groups.rows is None else groups.rows[slots].long()
        own, scales, _ = part_of(Weights(weight, row_scale), number, groups.parts)
        assert scales is not None
        if len(rows):
            product = int_mm(values[rows], own).float() * scales * token_scale[rows, None]
            found.append(product.to(dtype))
    return torch.cat(found)


def int8_grouped(
    values: Tensor, token_scale: Tensor, weight: Tensor, row_scale: Tensor, groups: Groups, dtype: torch.dtype,
    tile: GroupTile | None = None,
) -> Tensor:  # fmt: skip
    """Like `int8_grouped_reference`, without any wait for the device."""
    assert (token_scale.numel(), row_scale.numel()) == (len(values), len(weight)), "the scales do not fit"
    tile = tile or tile_for(groups.slots(values), groups, TILES)
    slots, n, grid = launch(values, weight, groups, tile)
    out = torch.empty(slots, n, dtype=dtype, device=values.device)
    _int8_grouped[grid](
        values, weight, out, token_scale, row_scale, *group_arguments(groups, slots, tile),
        **group_options(values, n, groups, tile),
    )  # fmt: skip
    return out


@partial(jit, varying=["m"])
def _int8_grouped(
    a_ptr, b_ptr, out_ptr, token_scale_ptr, row_scale_ptr, offsets_ptr, rows_ptr, m,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr, SCATTERED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    start_m, start_n = tile_origin(tl.program_id(0), m, N, TILE_M, TILE_N, BAND)
    part, first, last = group_tile(start_m // TILE_M, offsets_ptr, PARTS, WIDE, TILE_M)
    if first >= last:
        return
    slots = first + tl.arange(0, TILE_M)
    rows = tl.minimum(slots, last - 1)
    if SCATTERED:
        rows = tl.load(rows_ptr + rows)
    columns = start_n + tl.arange(0, TILE_N)
    own = part.to(tl.int64) * N + tl.minimum(columns, N - 1)
    depth = tl.arange(0, TILE_K)
    a = a_ptr + rows.to(tl.int64)[:, None] * K + depth[None, :]
    b = b_ptr + own[None, :] * K + depth[:, None]
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
    value = acc.to(tl.float32) * tl.load(row_scale_ptr + own)[None, :] * tl.load(token_scale_ptr + rows)[:, None]
    target = out_ptr + slots.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(target, value.to(out_ptr.dtype.element_ty), mask=(slots < last)[:, None] & (columns < N)[None, :])
