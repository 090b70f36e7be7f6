"""Products of routed experts: groups of rows, each times its own part of a stacked weight, in one launch.

Where groups end is known on the device alone. So there are as many programs as tiles could be needed at most; each
finds its group among the ends of all, and those beyond the last tile end at once. What a group costs are its own tiles.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..ops.linear import Dense, Weights
from ..ops.routed import Groups, Routes
from .tiles import tile_origin
from .triton_language import ceil_div, jit, next_power_of_2, tl


@dataclass(frozen=True)
class GroupTile:
    """How a program cuts the product of a group: `m` rows by `n` columns, `k` of the depth a step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


FEW, SOME, MANY = GroupTile(16, 64, 64, 4, 4), GroupTile(64, 128, 64, 4, 3), GroupTile(128, 128, 64, 8, 3)
TILES = (FEW, SOME, MANY)
"""By rows of a group: a tile with more rows than the groups have would be empty for the most part."""


def tile_for(rows: int, groups: Groups, tiles: tuple[GroupTile, ...] = TILES) -> GroupTile:
    """The tallest tile that groups of equal sizes would fill; `rows` of all groups together."""
    return next((tile for tile in reversed(tiles) if tile.m * groups.parts <= rows), tiles[0])


def grouped_matmul_reference(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """x [rows, K], weight [parts * N, K] -> [slots, N], see `ops.linear.Product.grouped`."""
    return Dense().grouped(x, Weights(weight), groups)


def grouped_matmul(x: Tensor, weight: Tensor, groups: Groups, tile: GroupTile | None = None) -> Tensor:
    """Like `grouped_matmul_reference`, in bf16 or fp16, without any wait for the device."""
    tile = tile or tile_for(groups.slots(x), groups)
    slots, n, grid = launch(x, weight, groups, tile)
    out = torch.empty(slots, n, dtype=x.dtype, device=x.device)
    _grouped_matmul[grid](x, weight, out, *group_arguments(groups, slots, tile), **group_options(x, n, groups, tile))
    return out


def launch(x: Tensor, weight: Tensor, groups: Groups, tile: GroupTile) -> tuple[int, int, tuple[int]]:
    """Slots, columns of each part, and the number of programs."""
    assert weight.shape[1] == x.shape[1], "the weight's row does not fit the input"
    assert x.is_contiguous(), "the activation must be contiguous"
    assert weight.is_contiguous(), "the weight must be contiguous"
    slots, n = groups.slots(x), len(weight) // groups.parts
    return slots, n, ((slots // tile.m + groups.parts) * ceil_div(n, tile.n),)


def group_arguments(groups: Groups, slots: int, tile: GroupTile) -> tuple[Tensor, Tensor, int]:
    """What `_group_tile` is told: ends of groups, rows of the activations, and rows as if every tile were needed."""
    rows = groups.offsets if groups.rows is None else groups.rows
    return groups.offsets, rows, (slots // tile.m + groups.parts) * tile.m


def group_options(x: Tensor, n: int, groups: Groups, tile: GroupTile) -> dict[str, object]:
    """Constants of a launch."""
    return {
        "N": n, "K": x.shape[1], "PARTS": groups.parts, "WIDE": next_power_of_2(groups.parts),
        "SCATTERED": groups.rows is not None, "TILE_M": tile.m, "TILE_N": tile.n, "TILE_K": tile.k, "BAND": 8,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def add_slots(residual: Tensor, slots: Tensor, routes: Routes) -> Tensor:
    """Like `ops.routed.add_slots`, in one pass; the residual's memory holds the result."""
    tokens, width = residual.shape
    assert residual.is_contiguous(), "the residual must be contiguous"
    assert slots.is_contiguous(), "the slots must be contiguous"
    block = min(1024, next_power_of_2(width))
    _add_slots[(tokens, ceil_div(width, block))](
        residual, slots, routes.places, routes.gains, WIDTH=width, ACTIVE=routes.places.shape[1], BLOCK=block,
        num_warps=4,
    )  # fmt: skip
    return residual


@jit
def group_tile(tile, offsets_ptr, PARTS: tl.constexpr, WIDE: tl.constexpr, TILE_M: tl.constexpr):
    """The group that a tile of rows belongs to, its first row and the group's end; 0 and 0 where there is none."""
    part = tl.arange(0, WIDE)
    begin = tl.load(offsets_ptr + part, mask=part < PARTS, other=0)
    end = tl.load(offsets_ptr + 1 + part, mask=part < PARTS, other=0)
    tiles = (end - begin + TILE_M - 1) // TILE_M
    after = tl.cumsum(tiles, 0)
    found = tl.sum((after <= tile).to(tl.int32), 0)
    mine = part == found
    first = tl.sum(tl.where(mine, begin + (tile - after + tiles) * TILE_M, 0), 0)
    last = tl.sum(tl.where(mine, end, 0), 0)
    return found, first, last


@partial(jit, varying=["m"])
def _grouped_matmul(
    x_ptr, w_ptr, out_ptr, offsets_ptr, rows_ptr, m,
    N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr, SCATTERED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    start_m, start_n = tile_origin(tl.program_id(0), m, N, TILE_M, TILE_N, BAND)
    part, first, last = group_tile(start_m // TILE_M, offsets_ptr, PARTS, WIDE, TILE_M)
    if first >= last:
        return
    slots = first + tl.arange(0, TILE_M)
    # Rows beyond the edge read the last row again: cheaper than a mask, and their results are not stored.
    rows = tl.minimum(slots, last - 1)
    if SCATTERED:
        rows = tl.load(rows_ptr + rows)
    columns = start_n + tl.arange(0, TILE_N)
    depth = tl.arange(0, TILE_K)
    a = x_ptr + rows.to(tl.int64)[:, None] * K + depth[None, :]
    b = w_ptr + (part.to(tl.int64) * N + tl.minimum(columns, N - 1))[None, :] * K + depth[:, None]
    acc = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for start in range(0, K, TILE_K):
        if K % TILE_K == 0:
            left, right = tl.load(a), tl.load(b)
        else:
            left = tl.load(a, mask=(depth < K - start)[None, :], other=0)
            right = tl.load(b, mask=(depth < K - start)[:, None], other=0)
        acc = tl.dot(left, right, acc)
        a += TILE_K
        b += TILE_K
    target = out_ptr + slots.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=(slots < last)[:, None] & (columns < N)[None, :])


@jit
def _add_slots(
    residual_ptr, slots_ptr, places_ptr, gains_ptr,
    WIDTH: tl.constexpr, ACTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    total = tl.load(residual_ptr + token * WIDTH + columns, mask=inside, other=0).to(tl.float32)
    for number in tl.static_range(ACTIVE):
        place = tl.load(places_ptr + token * ACTIVE + number).to(tl.int64)
        gain = tl.load(gains_ptr + token * ACTIVE + number)
        total += gain * tl.load(slots_ptr + place * WIDTH + columns, mask=inside, other=0).to(tl.float32)
    tl.store(residual_ptr + token * WIDTH + columns, total.to(residual_ptr.dtype.element_ty), mask=inside)
