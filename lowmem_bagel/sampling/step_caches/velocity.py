"""Velocities on a straight line: what two computed evaluations gave is extended to those that follow.

Steps are equally far apart in u, the time before the shift, so that a line in u is one in their number. What else was
tried, and what it lost by: docs/faster-pictures.md.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from .base import StepCache

if TYPE_CHECKING:
    from torch import Tensor

FIRST_COMPUTED = 2
INTERVALS = (2, 3, 4, 5, 6, 8)


def is_computed(interval: int, evaluation: int) -> bool:
    """The first ones are, then every `interval`-th; counted from 0."""
    since_start = evaluation - (FIRST_COMPUTED - 1)
    return since_start <= 0 or since_start % interval == 0


def computed(interval: int, evaluations: int) -> int:
    return sum(is_computed(interval, evaluation) for evaluation in range(evaluations))


def stored(evaluations: int) -> int:
    """The last two that were computed."""
    return min(evaluations, 2)


class Velocity:
    """Computes every `interval`-th evaluation and extends the line through the last two that it computed."""

    def __init__(self, interval: int) -> None:
        self.interval, self.evaluation = interval, 0
        self.known: list[tuple[int, Tensor]] = []
        """Evaluations and their velocities, the last two that were computed."""

    def predict(self) -> Tensor | None:
        if is_computed(self.interval, self.evaluation):
            return None
        (before, old), (last, new) = self.known
        ahead = (self.evaluation - last) / (last - before)
        self.evaluation += 1
        return new + (new - old) * ahead

    def after_first_layer(self, entering: Tensor, leaving: Tensor) -> Tensor | None:
        return None

    def store(self, hidden: Tensor) -> None:
        self.known = [*self.known[-1:], (self.evaluation, hidden)]
        self.evaluation += 1


def _every(interval: int) -> StepCache:
    return StepCache(
        f"velocity-{interval}",
        f"one step in {interval} is computed, the others lie on a line through the last two",
        partial(Velocity, interval),
        stored,
        partial(computed, interval),
        holds_result=True,
        predicts="velocities",
    )


VELOCITY = tuple(map(_every, INTERVALS))
