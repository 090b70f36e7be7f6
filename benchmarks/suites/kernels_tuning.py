"""`bench kernels --tune`: times the compile-time settings of the Triton kernels, to choose their tables by."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem_bagel.formats.int8 import kernels as int8_matmul
from lowmem_bagel.formats.int8.tiles import Tile
from lowmem_bagel.formats.nf4 import kernels as nf4
from lowmem_bagel.kernels import gemv, packed_gemv

from ..cases import Run, Setup
from ..timing import compile_ahead, graph_seconds


@dataclass(frozen=True)
class Tried:
    """What is tuned: a run for each setting, the weights it is given in turn, and the work of one call."""

    subject: str
    runs: Mapping[Any, Run]
    weights: list[Tensor]
    work: float


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
        (128, 256, 128, 8, 3), (128, 256, 64, 8, 3), (128, 128, 128, 8, 3), (128, 128, 64, 4, 4),
    )
]  # fmt: skip
FEW_ROW_TILES = [
    Tile(m, n, k, 4, stages, 1.0)
    for m, (n, k), stages in itertools.product((16, 64), ((16, 256), (32, 256), (64, 128), (32, 512)), (3, 5))
]
MOST_WEIGHTS = 32


def tune_kernels(on: Setup, threads: int) -> Iterator[dict[str, Any]]:
    """Every setting at the shape; prints the best five of each and gives all."""
    for tried in itertools.chain(_int8(on), _gemv(on), _packed(on)):
        failures = compile_ahead([partial(run, tried.weights[0]) for run in tried.runs.values()], threads)
        timed: list[tuple[float, str]] = []
        for (setting, run), failure in zip(tried.runs.items(), failures, strict=True):
            found: dict[str, Any] = {"subject": tried.subject, "setting": str(setting)}
            if failure is None:
                taken = graph_seconds([partial(run, weight) for weight in tried.weights], replays=5)
                found |= {"seconds": taken, "rate": tried.work / taken}
                timed.append((taken, str(setting)))
            else:
                found |= {"failure": str(failure).splitlines()[0][:200]}
            yield found
        print(f"\n{tried.subject}: {len(tried.runs)} settings, {len(tried.runs) - len(timed)} failed")
        for taken, setting in sorted(timed)[:5]:
            print(f"  {taken * 1e6:9.1f} us {tried.work / taken:.3e}/s {setting}", flush=True)


def _int8(on: Setup) -> Iterator[Tried]:
    bulk = BULK_TILES if on.capability[0] == 9 else []
    many = itertools.product((4096, 8192), on.linears.values())
    for m, (n, k) in (*many, (16, on.linears["gate_up"]), (64, on.linears["down"])):
        a, token, row = on.integers(m, k), on.wide(m).abs(), on.wide(n).abs()

        def run(weight: Tensor, tile: Tile, a: Tensor = a, token: Tensor = token, row: Tensor = row) -> Tensor:
            return int8_matmul.int8_matmul(a, token, weight, row, None, torch.bfloat16, tile, on.processors)

        tiles = [*bulk, *PLAIN_TILES] if m > 64 else [tile for tile in FEW_ROW_TILES if tile.m >= m]
        weights = on.rotated(on.integers, n, k, most=4 if m > 64 else MOST_WEIGHTS)
        runs = {tile: partial(run, tile=tile) for tile in tiles}
        yield Tried(f"int8_matmul {m} x {n} x {k}", runs, weights, 2.0 * m * n * k)


def _gemv(on: Setup) -> Iterator[Tried]:
    strips = [
        gemv.Strip(rows, depth, warps, stages)
        for rows, depth, warps, stages in itertools.product((2, 4, 8, 16), (256, 512, 1024), (4, 8), (1, 3))
        if 1024 <= rows * depth <= 8192
    ]
    for name, tokens in (("o", 1), ("gate_up", 1), ("gate_up", 8), ("down", 1)):
        n, k = on.linears[name]
        weights, x = on.rotated(on.random, n, k, most=MOST_WEIGHTS), on.random(tokens, k)
        runs = {s: partial(gemv.gemv, x, strip=s) for s in strips if s.rows * s.depth * tokens <= 16384}
        yield Tried(f"gemv bf16 {tokens} x {n} x {k}", runs, weights, weights[0].nbytes)


def _packed(on: Setup) -> Iterator[Tried]:
    """INT8 and NF4 with the norm, SwiGLU or residual that goes with the linear in a decoder layer."""
    strips = [
        packed_gemv.Strip(rows, words, warps)
        for rows, words, warps in itertools.product((2, 4, 8), (64, 128, 256, 512), (1, 2, 4, 8))
        if words >= 32 * warps and 4 <= rows * words // (32 * warps) <= 16
    ]
    forms = (("int8", gemv.integers(), on.integers, torch.int64, 1), ("nf4", nf4.levels(), on.packed, torch.int32, 2))
    for (form, code, make, word, per_byte), (name, (n, k)) in itertools.product(forms, on.linears.items()):
        weights = [w.view(word) for w in on.rotated(make, n, k // per_byte, most=MOST_WEIGHTS)]
        scale = on.wide(n if code.block is None else n * k // code.block).abs()
        for tokens in (1, 2, 4):
            x = on.random(tokens, k)
            given = {"residual": on.random(tokens, n)} if name in ("o", "down") else {"norm": on.random(k)}
            options: dict[str, Any] = {**given, "swiglu_output": name == "gate_up", "scale": scale, "code": code}
            runs = {s: partial(packed_gemv.packed_gemv, x, strip=s, **options) for s in strips if s.rows * tokens <= 32}
            work = weights[0].nbytes + scale.nbytes
            yield Tried(f"packed {form} {tokens} x {n} x {k}", runs, weights, work)
