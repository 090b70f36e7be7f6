"""How the INT8 matmul is cut into tiles on a card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ...kernels.triton_language import ceil_div, interpreted


@dataclass(frozen=True)
class Tile:
    """How one program cuts the product. `speed` is an estimate for where nothing was measured, relative: arithmetic per
    second with all programs busy."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    speed: float
    bulk: bool = False
    """Fetch with TMA, in persistent programs."""

    @property
    def name(self) -> str:
        shape = f"{self.m}x{self.n}x{self.k}, {self.warps} warps, {self.stages} stages"
        return shape + ", bulk" * self.bulk


class Shape(NamedTuple):
    """A product of m tokens [m, k] and a weight [n, k]."""

    m: int
    n: int
    k: int


Timings = Mapping[Shape, Mapping[Tile, float]]
"""Seconds of products by tile; no tile where nothing could be measured."""

HOPPER = (
    Tile(128, 256, 128, 8, 3, 1.00, bulk=True),
    Tile(128, 128, 128, 8, 4, 0.85, bulk=True),
    Tile(64, 128, 128, 4, 4, 0.60, bulk=True),
)
AMPERE = (
    Tile(128, 256, 64, 8, 3, 1.00),
    Tile(128, 128, 64, 4, 4, 0.95),
    Tile(64, 128, 64, 4, 4, 0.75),
)
MEASURED_TOO = (
    Tile(128, 128, 128, 8, 3, 0.0),
    Tile(256, 128, 64, 8, 3, 0.0),
    Tile(256, 128, 128, 8, 3, 0.0, bulk=True),
    Tile(64, 256, 128, 4, 4, 0.0, bulk=True),
)
"""Taken where they were measured to be the fastest, and never by estimate."""
CANDIDATES = (*HOPPER, *AMPERE, *MEASURED_TOO)
WORTH_IT = 0.98
"""A measured tile takes the estimate's place at this part of its time or less: what is nearer is as likely noise."""
FEW_ROWS = (
    Tile(16, 32, 256, 4, 8, 1.0),
    Tile(32, 32, 256, 4, 4, 1.0),
    Tile(64, 64, 128, 4, 4, 1.0),
)
"""For up to 64 rows time goes into reading the weight: narrow tiles spread it over all multiprocessors, and many stages
keep memory busy where there are few of them. Eight of the first take 84 KiB, which all cards with int8 tensor cores of
Triton's have."""


@dataclass(frozen=True)
class Tiles:
    """Chooses tiles for a card.

    bulk: it has Hopper's bulk copies (TMA). processors: multiprocessors. measured: on this card; else estimates serve.
    """

    processors: int
    bulk: bool
    measured: Timings = field(default_factory=dict)

    @classmethod
    def of(cls, device: torch.device) -> Tiles:
        """For a device, by estimates; the interpreter does bulk copies too."""
        if device.type != "cuda":
            return cls(1, interpreted())
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(processors, torch.cuda.get_device_capability(device)[0] == 9)

    def candidates(self, k: int) -> tuple[Tile, ...]:
        """What there is to choose from for many tokens. Bulk copies need rows of whole 16 bytes."""
        bulk = self.bulk and k % 16 == 0
        return tuple(t for t in CANDIDATES if t.bulk == bulk)

    def choose(self, m: int, n: int, k: int) -> Tile:
        """The tile with the least predicted time: whole waves of tiles over the multiprocessors, each of which takes as
        long as measured for the nearest number of tokens, or as estimated. One that was measured has to be faster than
        the estimate's by more than noise."""
        for tile in FEW_ROWS:
            if m <= tile.m:
                return tile
        estimated = min(
            (tile for tile in self.candidates(k) if tile.speed),
            key=lambda tile: self._waves(tile, m, n) * tile.m * tile.n / tile.speed,
        )
        known = (shape for shape, seconds in self.measured.items() if seconds and shape[1:] == (n, k))
        nearest = min(known, key=lambda shape: abs(math.log(m / shape.m)), default=None)
        if nearest is None:
            return estimated
        predicted = {
            tile: seconds * self._waves(tile, m, n) / self._waves(tile, *nearest[:2])
            for tile, seconds in self.measured[nearest].items()
        }
        fastest = min(predicted, key=lambda tile: predicted[tile])
        return fastest if predicted[fastest] <= WORTH_IT * predicted.get(estimated, math.inf) else estimated

    def _waves(self, tile: Tile, m: int, n: int) -> int:
        return ceil_div(ceil_div(m, tile.m) * ceil_div(n, tile.n), self.processors)
