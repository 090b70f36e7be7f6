"""How fast a picture is to be drawn, in one word, and the step cache that stands for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import SettingError
from .registry import step_caches

DEFAULT_STEPS = 49
"""Of a picture with the default number of timesteps."""


@dataclass(frozen=True)
class Speed:
    """A choice of a person's.

    drawing, editing: the step caches with the default number of timesteps or more. interval: with fewer, which lie
    further apart, what would be one computed step in so many is so much less.
    """

    name: str
    help: str
    drawing: str
    editing: str
    interval: int

    def step_cache(self, steps: int, editing: bool) -> str:
        """The name of the step cache for a picture of so many steps."""
        if steps >= DEFAULT_STEPS:
            return self.editing if editing else self.drawing
        name = f"velocity-{round(self.interval * steps / DEFAULT_STEPS)}"
        return name if name in step_caches() else "none"


EXACT = Speed("exact", "every step is computed", "none", "none", 1)
SPEEDS: Mapping[str, Speed] = {
    speed.name: speed
    for speed in (
        EXACT,
        Speed("balanced", "a third of the steps is computed", "velocity-3", "velocity-3", 3),
        Speed("fast", "a quarter of the steps is computed", "velocity-early", "velocity-late", 4),
    )
}


def chosen_cache(speed: str, step_cache: str, steps: int, editing: bool) -> str:
    """The step cache that was named, or that stands for a speed.

    Raises:
        SettingError: both were chosen.
    """
    meant = SPEEDS[speed].step_cache(steps, editing)
    if speed != EXACT.name and step_cache not in ("none", meant):
        raise SettingError(
            f"speed {speed} means step_cache {meant} here, and step_cache {step_cache} was asked for; give one"
        )
    return step_cache if speed == EXACT.name else meant


def flag(step_cache: str, editing: bool) -> str:
    """How the command line asks for a step cache with the default number of timesteps: by its speed, if it is one's."""
    for speed in SPEEDS.values():
        if speed is not EXACT and speed.step_cache(DEFAULT_STEPS, editing) == step_cache:
            return f"--speed {speed.name}"
    return "" if step_cache == "none" else f"--step-cache {step_cache}"
