"""How the INT8 matmul is cut into tiles on a card."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.triton_language import ceil_div, interpreted


@dataclass(frozen=True)
class Tile:
    """How one program cuts the product. `speed` is relative: arithmetic per second with all programs busy."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    speed: float
    bulk: bool = False
    """Fetch with TMA, in persistent programs."""


# Speeds are estimates, not yet measured: `lowmem-bagel bench kernels --tune` gives real ones.
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
FEW_ROWS = (
    Tile(16, 32, 256, 4, 4, 1.0),
    Tile(32, 32, 256, 4, 4, 1.0),
    Tile(64, 64, 128, 4, 4, 1.0),
)
"""For up to 64 rows time goes into reading the weight: narrow tiles spread it over all multiprocessors."""


@dataclass(frozen=True)
class Tiles:
    """Chooses tiles for a card. bulk: it has Hopper's bulk copies (TMA); processors: multiprocessors."""

    processors: int
    bulk: bool

    @classmethod
    def of(cls, device: torch.device) -> Tiles:
        """For a device; the interpreter does bulk copies too."""
        if device.type != "cuda":
            return cls(1, interpreted())
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(processors, torch.cuda.get_device_capability(device)[0] == 9)

    def choose(self, m: int, n: int, k: int) -> Tile:
        """The tile with the least predicted time: whole waves of tiles over the multiprocessors. Bulk copies need rows
        of whole 16 bytes."""
        for tile in FEW_ROWS:
            if m <= tile.m:
                return tile

        def predicted(tile: Tile) -> float:
            waves = ceil_div(ceil_div(m, tile.m) * ceil_div(n, tile.n), self.processors)
            return waves * tile.m * tile.n / tile.speed

        return min(HOPPER if self.bulk and k % 16 == 0 else AMPERE, key=predicted)
