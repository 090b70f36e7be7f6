"""The INT8 matmul's tiles measured where they run: once on a card, and kept in the user's cache folder.

What is the fastest depends on a card's multiprocessors, caches and clocks, and on what its Triton makes of a tile; no
table can know that. So the few candidates are timed at the model's own shapes when a card first loads INT8, which takes
seconds, and what was found serves as long as card, driver, Triton and this package stay the same. Tiles change no bit.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import first_line
from ...hardware.host import driver_version
from ...hardware.user_cache import cache_folder, keep, kept
from ...kernels.trial_inputs import FEW_ROWS, Sizes, random_bytes, repeated
from ...kernels.triton_language import VERSION
from ...ops.device import captured, empty_cache, enter, on
from .tiles import CANDIDATES, Shape, Tile, Tiles, Timings

TOKENS = (300, 4096, 8192)
"""Where tiles are compared: a prompt, and a picture of 1024x1024 with one and with two branches of guidance."""
SECONDS = 5.0
"""After so many no further comparison is begun; estimates serve the shapes that are left."""
TURNS = 5
CHECKED = 200
"""Tokens whose results are compared."""
COMPILERS = 8
"""Kernels compiled at a time, at most."""

Seconds = Callable[[Shape, Tile], float]
"""How long a product takes with a tile. Raises where the tile does not run on the card or gives a wrong result."""
Clock = Callable[[], float]


def tuned_tiles(device: torch.device, sizes: Sizes, tune: bool) -> tuple[Tiles, str]:
    """The tiles for a model on a device, measured now if they never were; and where they come from, in words.

    Nothing is measured that cannot be kept: it would take its seconds at every load. A tile that fails on the card is
    none for it; the words name it with its reason.
    """
    tiles = Tiles.of(device)
    if device.type != "cuda":
        return tiles, "estimated: there is no card"
    if not tune:
        return tiles, "estimated, as asked for"
    key, wanted = key_of(device), shapes_of(sizes)
    known = kept_timings(key)
    missing = [shape for shape in wanted if shape not in known]
    if not missing:
        return replace(tiles, measured=known), "measured on this card before"
    begun = time.perf_counter()
    try:
        keep_timings(key, known)
        with on(device):
            seconds = CardSeconds(device, sizes.around, tiles)
            seconds.compile(missing)
            found, failed = compare(missing, tiles, seconds, limit=SECONDS + begun - time.perf_counter())
            del seconds
            empty_cache()
        keep_timings(key, found)
    except OSError as error:
        return tiles, f"estimated: what is measured cannot be kept ({error})"
    without = "".join(f"; {tile.name} fails: {reason}" for tile, reason in failed.items())
    words = f"measured on this card in {time.perf_counter() - begun:.1f} s{without}"
    return replace(tiles, measured={**known, **found}), words


def shapes_of(sizes: Sizes) -> list[Shape]:
    """What is compared for a model: what takes longest first."""
    shapes = {Shape(m, n, k) for n, k, _ in sizes.linears for m in TOKENS}
    return sorted(shapes, key=lambda shape: (-shape.m * shape.n * shape.k, shape))


def compare(
    shapes: Iterable[Shape],
    tiles: Tiles,
    seconds: Seconds,
    clock: Clock = time.perf_counter,
    limit: float = SECONDS,
) -> tuple[dict[Shape, dict[Tile, float]], dict[Tile, str]]:
    """Every candidate at every shape, and why a tile failed where one did.

    There is none at a shape for which there was no time, or where none runs. A shape is left out for which there is no
    memory just now.
    """
    end = clock() + limit
    found: dict[Shape, dict[Tile, float]] = {}
    failed: dict[Tile, str] = {}
    for shape in shapes:
        timed: dict[Tile, float] = {}
        found[shape] = timed
        for tile in tiles.candidates(shape.k):
            if clock() >= end:
                timed.clear()
                break
            try:
                timed[tile] = seconds(shape, tile)
            except torch.OutOfMemoryError:
                del found[shape]
                break
            except Exception as error:  # compilers and drivers fail in their own ways
                failed.setdefault(tile, first_line(error))
    return found, failed


class CardSeconds:
    """`Seconds` on a card, with random numbers. Operands of one shape are held at a time."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tiles: Tiles) -> None:
        self.device, self.dtype, self.tiles = device, dtype, tiles
        self._shape: Shape | None = None
        self._operands: tuple[Tensor, ...] = ()
        self._weights: list[Tensor] = []
        """Copies of one weight, more than the card's cache holds: a model's weights are read from its memory."""

    def compile(self, shapes: Sequence[Shape]) -> None:
        """Every kernel that is to be timed, several at a time; what fails here fails again then."""
        least = {k: min(shape for shape in shapes if shape.k == k) for k in {shape.k for shape in shapes}}
        for shape in least.values():
            try:
                self._hold(shape)
            except torch.OutOfMemoryError:
                continue
            with ThreadPoolExecutor(min(COMPILERS, os.cpu_count() or 1)) as pool:
                for made in [pool.submit(self._on_card, tile) for tile in self.tiles.candidates(shape.k)]:
                    made.exception()

    def __call__(self, shape: Shape, tile: Tile) -> float:
        self._hold(shape)
        # Integers are added exactly and scaled alike, so all tiles give the same bits.
        if not torch.equal(self._product(tile, CHECKED), self._product(self.tiles.choose(*shape), CHECKED)):
            raise RuntimeError("a wrong result")
        products = partial(self._products, tile, shape.m)
        graph = captured(self.device, products, products)
        return min(self._replayed(graph) for _ in range(TURNS)) / len(self._weights)

    def _hold(self, shape: Shape) -> None:
        if shape != self._shape:
            self._shape, self._operands, self._weights = shape, (), []
            for seed, rows in enumerate(shape[:2]):
                few = random_bytes(self.device, FEW_ROWS, shape.k, seed=seed).view(torch.int8)
                self._operands += repeated(few, rows), torch.full((rows,), 2.0**-8, device=self.device)
            weight = self._operands[2]
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self._weights = [weight, *(weight.clone() for _ in range(2 * cache // weight.nbytes))]

    def _product(self, tile: Tile, tokens: int, weight: Tensor | None = None) -> Tensor:
        from .kernels import int8_matmul

        values, token_scale, own, row_scale = self._operands
        operands = values[:tokens], token_scale[:tokens], own if weight is None else weight, row_scale
        return int8_matmul(*operands, None, self.dtype, tile, self.tiles.processors)

    def _products(self, tile: Tile, tokens: int) -> None:
        for weight in self._weights:
            self._product(tile, tokens, weight)

    def _on_card(self, tile: Tile) -> None:
        with on(self.device):  # which is current is each thread's own
            enter(self.device)
            self._product(tile, CHECKED)

    def _replayed(self, graph: torch.cuda.CUDAGraph) -> float:
        """Seconds on the card alone: of a short product the host takes longer to launch it."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)
        start.record(stream)
        graph.replay()
        end.record(stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def kept_tiles(device: torch.device) -> Tiles:
    """The tiles for a device by what is kept of it, without measuring anything."""
    tiles = Tiles.of(device)
    return replace(tiles, measured=kept_timings(key_of(device))) if device.type == "cuda" else tiles


def kept_timings(key: Mapping[str, str]) -> dict[Shape, dict[Tile, float]]:
    """What was measured before, on the same card by the same programs; empty where nothing was."""
    try:
        return read(kept(path_of(key)), key)
    except OSError:
        return {}


def keep_timings(key: Mapping[str, str], timings: Timings) -> None:
    """Keep what was measured, beside what another process may have kept meanwhile.

    Raises:
        OSError: it cannot be written.
    """
    keep(path_of(key), written(key, {**kept_timings(key), **timings}))


def key_of(device: torch.device) -> dict[str, str]:
    """What timings hold for."""
    from ... import __version__

    properties = torch.cuda.get_device_properties(device)
    return {
        "card": properties.name,
        "multiprocessors": str(properties.multi_processor_count),
        "driver": driver_version(),
        "triton": VERSION,
        "version": __version__,
        "candidates": "; ".join(tile.name for tile in CANDIDATES),
    }


def path_of(key: Mapping[str, str]) -> Path:
    """The file of a card. Raises OSError where the user has no home."""
    named = (key[part] for part in ("card", "multiprocessors", "driver", "triton", "version"))
    return cache_folder() / f"int8-tiles_{'_'.join(re.sub(r'[^A-Za-z0-9.]+', '-', part) for part in named)}.json"


def written(key: Mapping[str, str], timings: Timings) -> dict[str, Any]:
    """What a file holds."""
    seconds = {
        "x".join(map(str, shape)): {tile.name: value for tile, value in by_tile.items()}
        for shape, by_tile in timings.items()
    }
    return {"for": dict(key), "seconds": seconds}


def read(value: Any, key: Mapping[str, str]) -> dict[Shape, dict[Tile, float]]:
    """The timings of a file's content; none where it is damaged, or of something else."""
    by_name = {tile.name: tile for tile in CANDIDATES}
    try:
        if value["for"] != dict(key):
            return {}
        found = {
            Shape(*map(int, shape.split("x"))): {by_name[name]: float(seconds) for name, seconds in by_tile.items()}
            for shape, by_tile in value["seconds"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    right = all(0 < seconds < math.inf for by_tile in found.values() for seconds in by_tile.values())
    return found if right and all(min(shape) > 0 for shape in found) else {}


def tiles_report(device: torch.device) -> dict[str, str]:
    """For `doctor`: tokens -> the measured tile of each weight; empty where nothing was measured."""
    tiles = kept_tiles(device)
    found: dict[str, list[str]] = {}
    for shape, seconds in sorted(tiles.measured.items()):
        if seconds:
            tile = tiles.choose(*shape)
            line = f"{shape.n}x{shape.k} by {tile.name} in {seconds[tile] * 1e3:.3g} ms"
            found.setdefault(f"{shape.m} tokens", []).append(line)
    return {tokens: "; ".join(lines) for tokens, lines in found.items()}
