"""`lowmem-bagel bench int8-tiles`: what measuring INT8's tiles on a card brings against the estimates.

Tiles are compared as at loading, within its seconds, and nothing is kept. Then every linear is timed by either choice
in a CUDA graph of weights beyond the cache, also for numbers of tokens that were not measured. "layers" are the four
linears of all layers: what a step of a picture spends in them. `bench engine int8 int8:tune=0` compares whole pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem_bagel.formats.int8.kernels import int8_matmul
from lowmem_bagel.formats.int8.tiles import Tile, Tiles
from lowmem_bagel.formats.int8.tuning import SECONDS, CardSeconds, compare, shapes_of, written
from lowmem_bagel.kernels.trial_inputs import Sizes

from ..cases import Setup
from ..options import Out, Seed, Shape
from ..record import write_record
from ..timing import Call, graph_seconds

TOKENS = (100, 300, 1024, 2048, 4096, 4098, 4902, 8192, 8196)
Timer = Callable[[Sequence[Call]], float]


def int8_tiles_command(shape: Shape = "bagel-7b", seed: Seed = 0, out: Out = Path("int8_tiles.json")) -> None:
    """Time INT8's linears by estimated and by measured tiles, and write a JSON record."""
    setup = Setup.of(shape, False, seed)
    sizes, estimated = Sizes(setup.decoder, setup.half), Tiles.of(setup.device)
    begun = time.perf_counter()
    seconds = CardSeconds(setup.device, setup.half, estimated)
    seconds.compile(shapes_of(sizes))
    compiled = time.perf_counter() - begun
    timings, failed = compare(shapes_of(sizes), estimated, seconds, limit=SECONDS - compiled)
    took = time.perf_counter() - begun
    print(*(f"{tile.name} fails: {reason}" for tile, reason in failed.items()), sep="\n", flush=True)
    print(f"compiled in {compiled:.1f} s, compared in {took - compiled:.1f} s", flush=True)
    rows = []
    for row in linear_rows(setup, estimated, replace(estimated, measured=timings), graph_seconds):
        print(_line(row), flush=True)
        rows.append(row)
    layers = list(layer_rows(rows, setup.decoder.num_layers))
    print(*map(_line, layers), sep="\n")
    write_record(out, "int8_tiles", {"shape": shape, "seed": seed}, {
        "compile_seconds": compiled, "compare_seconds": took - compiled,
        "measured": written({}, timings)["seconds"], "failed": {tile.name: why for tile, why in failed.items()},
        "linears": rows, "layers": layers,
    })  # fmt: skip


def linear_rows(on: Setup, estimated: Tiles, measured: Tiles, timer: Timer) -> Iterator[dict[str, Any]]:
    """Every linear for every number of tokens, by the tile that each choice takes."""
    for name, (n, k) in on.linears.items():
        weights, row = on.rotated(on.integers, n, k, most=4), on.wide(n).abs()
        for m in on.tokens(*TOKENS):
            values, token = on.integers(m, k), on.wide(m).abs()

            def run(
                weight: Tensor, tile: Tile, values: Tensor = values, token: Tensor = token, row: Tensor = row
            ) -> Tensor:
                return int8_matmul(values, token, weight, row, None, on.half, tile, estimated.processors)

            chosen = [tiles.choose(m, n, k) for tiles in (estimated, measured)]
            seconds = {tile: timer([partial(run, weight, tile) for weight in weights]) for tile in set(chosen)}
            yield {
                "linear": name, "tokens": m, "estimated_tile": chosen[0].name, "measured_tile": chosen[1].name,
                "estimated_seconds": seconds[chosen[0]], "measured_seconds": seconds[chosen[1]],
            }  # fmt: skip


def layer_rows(rows: Sequence[dict[str, Any]], layers: int) -> Iterator[dict[str, Any]]:
    """The linears of all layers together, for every number of tokens."""
    for m in dict.fromkeys(row["tokens"] for row in rows):
        parts = [row for row in rows if row["tokens"] == m]
        sums = {name: layers * sum(row[name] for row in parts) for name in ("estimated_seconds", "measured_seconds")}
        yield {"linear": "layers", "tokens": m, **sums}


def _line(row: dict[str, Any]) -> str:
    before, after = row["estimated_seconds"], row["measured_seconds"]
    tiles = f"  {row['estimated_tile']} -> {row['measured_tile']}" if "measured_tile" in row else ""
    gain = f"{before * 1e6:9.1f} -> {after * 1e6:9.1f} us {after / before - 1:+7.1%}"
    return f"{row['linear']:8} {row['tokens']:5} {gain}{tiles}"
