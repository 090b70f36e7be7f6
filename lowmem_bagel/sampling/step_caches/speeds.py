"""How fast a picture is to be drawn, in one word, and the step cache that stands for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .registry import step_caches

DEFAULT_STEPS = 49
"""Of a picture with the default number of timesteps."""
MOST = 10
"""No step cache is asked for that predicts so many steps in a row."""


@dataclass(frozen=True)
class Speed:
    """A choice of a person's.

    interval: of so many steps one is computed, with the default number of timesteps; with fewer of them, which lie
    further apart, so much more often.
    """

    name: str
    help: str
    interval: int

    def step_cache(self, steps: int) -> str:
        """The name of the step cache for a picture of so many steps."""
        wanted, known = round(self.interval * steps / DEFAULT_STEPS), step_caches()
        names = (f"velocity-{interval}" for interval in range(min(wanted, MOST), 1, -1))
        return next((name for name in names if name in known), "none")


EXACT = Speed("exact", "every step is computed", 1)
SPEEDS: Mapping[str, Speed] = {
    speed.name: speed
    for speed in (
        EXACT,
        Speed("balanced", "a third of the steps is computed", 3),
        Speed("fast", "a quarter of the steps is computed", 4),
    )
}
