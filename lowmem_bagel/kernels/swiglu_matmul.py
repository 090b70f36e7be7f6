"""The MLP's first linear with SwiGLU as it is written: gate and up never reach memory.

    y = silu(x @ G.T) * (x @ U.T),  W = [G | U] stacked by rows

For many tokens, in bf16 or fp16 on a card with Hopper's bulk copies (TMA). Each program multiplies a tile of x by the
same rows of G and U as one tile twice as wide, so that a thread holds both values that it needs; both are rounded to
the activations' dtype before SwiGLU, as a matmul that wrote them would.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-calls=False

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import swiglu
from .packed_gemv import silu
from .tiles import tile_origin
from .triton_language import TensorDescriptor, ceil_div, jit, tl


@dataclass(frozen=True)
class SwigluTile:
    """How a program cuts the product: `m` tokens by `n` columns of the result, `k` of the depth a step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


TILE = SwigluTile(128, 128, 64, 8, 4)
"""The best of a dozen tried on an H200 at 4098 and 8196 tokens of BAGEL-7B; `bench kernels` compares it with the
library's matmul and SwiGLU after it."""
LEAST_TOKENS = 512
"""Fewer leave multiprocessors without a tile, or tiles half empty."""


def swiglu_matmul_reference(x: Tensor, weight: Tensor) -> Tensor:
    """x: [..., K], weight: [2 * N, K] of x's dtype -> [..., N]."""
    return swiglu(F.linear(x, weight))


def swiglu_matmul(x: Tensor, weight: Tensor, processors: int, tile: SwigluTile = TILE) -> Tensor:
    """Like `swiglu_matmul_reference`, for N and K that are multiples of 8.

    processors: multiprocessors of the device; programs stay on theirs.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n = rows.shape, weight.shape[0] // 2
    assert weight.shape == (2 * n, k), "the weight does not fit the input"
    assert (n % 8, k % 8) == (0, 0), "bulk copies need rows of whole 16 bytes"
    assert weight.is_contiguous(), "the weight must be contiguous"
    out = torch.empty(*x.shape[:-1], n, dtype=x.dtype, device=x.device)
    tiles = ceil_div(m, tile.m) * ceil_div(n, tile.n)
    _swiglu_matmul[(min(processors, tiles),)](
        TensorDescriptor.from_tensor(rows, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(weight.view(2, n, k), [2, tile.n, tile.k]),
        TensorDescriptor.from_tensor(out.view(m, n), [tile.m, tile.n]),
        m, n, K=k, TILE_M=tile.m, TILE_N=tile.n, TILE_K=tile.k, GROUP=8, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@partial(jit, varying=["m"])
def _swiglu_matmul(
    x, w, out, m, n,
    K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(m, TILE_M) * tl.cdiv(n, TILE_N)
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        start_m, start_n = tile_origin(index, m, n, TILE_M, TILE_N, GROUP)
        acc = tl.zeros((TILE_M, 2 * TILE_N), dtype=tl.float32)
        for start in range(0, K, TILE_K):
            both = w.load([0, start_n, start]).reshape(2 * TILE_N, TILE_K)
            acc = tl.dot(x.load([start_m, start]), both.T, acc)
        gate, up = acc.reshape(TILE_M, 2, TILE_N).permute(0, 2, 1).split()
        gate, up = gate.to(out.dtype).to(tl.float32), up.to(out.dtype).to(tl.float32)
        activated = silu(gate).to(out.dtype).to(tl.float32)
        out.store([start_m, start_n], (activated * up).to(out.dtype))
