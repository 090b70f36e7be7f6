"""Times the compile-time settings of the Triton kernels, to choose the tables in `lowmem_bagel.kernels` by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem_bagel.formats.int8 import kernels as int8_matmul
from lowmem_bagel.formats.int8.kernels import Tile
from lowmem_bagel.formats.nf4 import kernels as nf4
from lowmem_bagel.kernels import gemv, packed_gemv

from ..timing import Call, compile_ahead, copies_beyond_cache, seconds

Finding = dict[str, Any]
Trial = tuple[str, str, Sequence[Call], float]
"""What is tuned, the setting, the calls to time, and the work of one call."""

BULK_TILES = [
    Tile(m, n, k, warps, stages, 1.0, bulk=True)
    for m, n, k, warps, stages in (
        (128, 256, 128, 8, 3), (128, 256, 128, 8, 4), (256, 128, 128, 8, 3), (128, 256, 64, 8, 4),
        (128, 128, 128, 8, 4), (128, 128, 128, 4, 4), (128, 128, 128, 8, 3), (64, 256, 128, 4, 4), (64, 128, 128, 4, 4),
    )
]  # fmt: skip
PLAIN_TILES = [
    Tile(m, n, k, warps, stages, 1.0)
    for m, n, k, warps, stages in (
        (128, 256, 128, 8, 3),
        (128, 256, 64, 8, 3),
        (128, 128, 128, 8, 3),
        (128, 128, 64, 4, 4),
    )
]
PACKED_SHAPES = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
GEMV_SHAPES = ((3584, 3584), (37888, 3584), (3584, 18944))
FEW_ROW_TILES = [
    Tile(m, n, k, 4, stages, 1.0)
    for m, (n, k), stages in itertools.product((16, 64), ((16, 256), (32, 256), (64, 128), (32, 512)), (3, 5))
]


def tune(device: torch.device, threads: int) -> list[Finding]:
    """Every setting at BAGEL-7B's shapes; prints the best five of each and returns all."""
    findings: list[Finding] = []
    for section in (_int8_trials, _gemv_trials, _packed_trials):
        for lot in section(device):
            failures = compile_ahead([calls[0] for _, _, calls, _ in lot], threads)
            timed: list[Finding] = []
            for (subject, setting, calls, work), failure in zip(lot, failures, strict=True):
                found: Finding = {"subject": subject, "setting": setting}
                if failure is None:
                    taken = seconds(calls, replays=5)
                    found |= {"seconds": taken, "rate": work / taken}
                else:
                    found |= {"failure": str(failure).splitlines()[0][:200]}
                timed.append(found)
            findings += timed
            ranked = sorted((f["seconds"], f["setting"], f["rate"]) for f in timed if "seconds" in f)
            print(f"\n{lot[0][0]}: {len(lot)} settings, {len(lot) - len(ranked)} failed")
            for taken, setting, rate in ranked[:5]:
                print(f"  {taken * 1e6:9.1f} us {rate:.3e}/s {setting}", flush=True)
    return findings


def _rotated(make: Callable[..., Tensor], *shape: int) -> list[Tensor]:
    first = make(*shape)
    return [first] + [make(*shape) for _ in range(min(copies_beyond_cache(first.nbytes), 32) - 1)]


def _integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda")


def _packed(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")


def _floats(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def _int8_trials(device: torch.device) -> Iterator[list[Trial]]:
    properties = torch.cuda.get_device_properties(device)
    bulk = BULK_TILES if properties.major == 9 else []

    def run(weight: Tensor, tile: Tile, a: Tensor, token: Tensor, row: Tensor) -> Tensor:
        return int8_matmul.int8_matmul(
            a, token, weight, row, None, torch.bfloat16, tile, properties.multi_processor_count
        )

    for m, n, k in (
        (4096, 4608, 3584), (4096, 3584, 3584), (4096, 37888, 3584), (4096, 3584, 18944), (8192, 37888, 3584),
        (8192, 3584, 18944), (16, 37888, 3584), (64, 3584, 18944),
    ):  # fmt: skip
        a, token, row = _integers(m, k), torch.rand(m, device=device), torch.rand(n, device=device)
        weights = _rotated(_integers, n, k)[: 4 if m > 64 else None]
        tiles = [*bulk, *PLAIN_TILES] if m > 64 else [tile for tile in FEW_ROW_TILES if tile.m >= m]
        subject = f"int8_matmul {m} x {n} x {k}"
        yield [
            (subject, str(tile), [partial(run, w, tile, a, token, row) for w in weights], 2.0 * m * n * k)
            for tile in tiles
        ]


def _gemv_trials(device: torch.device) -> Iterator[list[Trial]]:
    strips = [
        gemv.Strip(rows, depth, warps, stages)
        for rows, depth, warps, stages in itertools.product((2, 4, 8, 16), (256, 512, 1024), (4, 8), (1, 3))
        if 1024 <= rows * depth <= 8192
    ]
    for n, k in GEMV_SHAPES:
        weights = _rotated(_floats, n, k)
        for tokens in (1, 8) if n > 4000 else (1,):
            x = _floats(tokens, k)
            yield [
                (f"gemv bf16 {tokens} x {n} x {k}", str(strip),
                 [partial(gemv.gemv, x, w, strip=strip) for w in weights], weights[0].nbytes)
                for strip in strips if strip.rows * strip.depth * tokens <= 16384
            ]  # fmt: skip


def _packed_trials(device: torch.device) -> Iterator[list[Trial]]:
    """INT8 and NF4 with the norm, SwiGLU or residual that goes with the shape in a decoder layer."""
    strips = [
        packed_gemv.Strip(rows, words, warps)
        for rows, words, warps in itertools.product((2, 4, 8), (64, 128, 256, 512), (1, 2, 4, 8))
        if words >= 32 * warps and 4 <= rows * words // (32 * warps) <= 16
    ]
    codes = {"int8": (gemv.integers(), _integers, torch.int64, 1), "nf4": (nf4.levels(), _packed, torch.int32, 2)}
    for (name, (code, make, word, per_byte)), (n, k) in itertools.product(codes.items(), PACKED_SHAPES):
        weights = [w.view(word) for w in _rotated(make, n, k // per_byte)]
        scale = torch.rand(n if code.block is None else n * k // code.block, device=device)
        for tokens in (1, 2, 4):
            x = _floats(tokens, k)
            options: dict[str, Any] = {"residual": _floats(tokens, n)} if n == k or k > n else {"norm": _floats(k)}
            options |= {"swiglu_output": n > 5 * k}
            yield [
                (f"packed {name} {tokens} x {n} x {k}", str(strip),
                 [partial(packed_gemv.packed_gemv, x, w, scale, code, strip=strip, **options) for w in weights],
                 weights[0].nbytes + scale.nbytes)
                for strip in strips if strip.rows * tokens <= 32
            ]  # fmt: skip
