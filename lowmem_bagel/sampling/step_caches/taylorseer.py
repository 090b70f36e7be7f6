"""TaylorSeer (arXiv 2503.06923) with upstream's settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .base import StepCache

if TYPE_CHECKING:
    from torch import Tensor

FIRST_COMPUTED = 5
INTERVAL = 3
MAX_ORDER = 6


def is_computed(evaluation: int) -> bool:
    """The first ones are, then every third; counted from 0."""
    since_start = evaluation - (FIRST_COMPUTED - 1)
    return since_start <= 0 or since_start % INTERVAL == 0


def computed(evaluations: int) -> int:
    return sum(map(is_computed, range(evaluations)))


def stored(evaluations: int) -> int:
    """The last hidden states, and as many differences as there were computed evaluations to make them from."""
    differences = max(0, computed(evaluations) - (FIRST_COMPUTED - 1))
    return 1 + min(differences, MAX_ORDER)


class TaylorSeer:
    """Taylor extrapolation of the decoder's last hidden states.

    From evaluation 4 on each computed one updates the finite differences D(i+1) = (new D(i) - old D(i)) / distance; the
    others are predicted as sum of D(i) * x^i / i!.
    """

    def __init__(self) -> None:
        self.evaluation = 0
        self.last_computed = 0
        self.differences: list[Tensor] = []

    def predict(self) -> Tensor | None:
        if is_computed(self.evaluation):
            return None
        x = self.evaluation - self.last_computed
        self.evaluation += 1
        predicted = self.differences[0]
        for order, difference in enumerate(self.differences[1:], start=1):
            predicted = predicted + difference * (x**order / math.factorial(order))
        return predicted

    def after_first_layer(self, entering: Tensor, leaving: Tensor) -> Tensor | None:
        return None

    def store(self, hidden: Tensor) -> None:
        updated = [hidden]
        if self.evaluation >= FIRST_COMPUTED - 1:
            distance = self.evaluation - self.last_computed
            for old in self.differences[:MAX_ORDER]:
                updated.append((updated[-1] - old) / distance)
        self.differences = updated
        self.last_computed = self.evaluation
        self.evaluation += 1


TAYLORSEER = StepCache(
    "taylorseer",
    "most steps are extrapolated from earlier ones; the picture changes a little",
    TaylorSeer,
    stored,
    computed,
    holds_result=True,
)
