"""Velocities on a straight line: what two computed evaluations gave is extended to those that follow.

Steps are equally far apart in u, the time before the shift, so that a line in u is one in their number. What else was
tried, and what it lost by: docs/faster-pictures.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from .base import StepCache

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Which evaluations are computed, counted from 0: the first ones, then from an evaluation on every so manieth.

    first: how many at the start. intervals: (from which evaluation on, every how manieth), the earliest first.
    """

    first: int
    intervals: tuple[tuple[int, int], ...]

    @property
    def words(self) -> str:
        """Which step in how many."""
        (_, every), *later = self.intervals
        return ", ".join((f"one step in {every}", *(f"from step {start} on in {every}" for start, every in later)))

    def following(self, evaluation: int) -> int:
        """The computed evaluation after one that is computed."""
        if evaluation < self.first - 1:
            return evaluation + 1
        return evaluation + next(every for start, every in reversed(self.intervals) if start <= evaluation)

    def computed(self, evaluations: int) -> int:
        """How many of so many."""
        count, evaluation = 0, 0
        while evaluation < evaluations:
            count, evaluation = count + 1, self.following(evaluation)
        return count


class Velocity:
    """Computes the evaluations of a pattern and extends the line through the last two that it computed."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern, self.evaluation, self.next = pattern, 0, 0
        self.known: list[tuple[int, Tensor]] = []
        """Evaluations and their velocities, the last two that were computed."""

    def predict(self) -> Tensor | None:
        if self.evaluation == self.next:
            return None
        (before, old), (last, new) = self.known[0], self.known[-1]
        # One point alone is repeated.
        ahead = (self.evaluation - last) / (last - before) if last > before else 0.0
        self.evaluation += 1
        return new + (new - old) * ahead

    def after_first_layer(self, entering: Tensor, leaving: Tensor) -> Tensor | None:
        return None

    def store(self, hidden: Tensor) -> None:
        self.known = [*self.known[-1:], (self.evaluation, hidden)]
        self.next = self.pattern.following(self.evaluation)
        self.evaluation += 1


def _stored(evaluations: int, pattern: Pattern) -> int:
    """The last two that were computed."""
    return min(pattern.computed(evaluations), 2)


def _declared(name: str, pattern: Pattern) -> StepCache:
    return StepCache(
        name,
        f"{pattern.words} is computed; the others lie on a line through the last two",
        partial(Velocity, pattern),
        partial(_stored, pattern=pattern),
        pattern.computed,
        holds_result=True,
        predicts="velocities",
    )


EARLY = Pattern(1, ((0, 2), (8, 4), (24, 6)))
"""Early steps compose a drawing: with them further apart, shapes change."""
LATE = Pattern(1, ((0, 8), (8, 4)))
"""An edit is composed by the picture that it begins from: of early steps fewer do."""
PATTERNS: Mapping[str, Pattern] = {
    **{f"velocity-{n}": Pattern(1, ((0, n),)) for n in (2, 3, 4)},
    "velocity-early": EARLY,
    "velocity-late": LATE,
}
"""By a cache's name."""
VELOCITY = tuple(_declared(name, pattern) for name, pattern in PATTERNS.items())
