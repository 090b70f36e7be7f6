"""Step caches: predict the decoder's output on some steps instead of computing it. One per guidance branch."""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor


class StepCache(Protocol):
    """Told of every evaluation of its branch, in order: either `predict` answers it, or `store` is called."""

    def predict(self) -> Tensor | None:
        """The branch's hidden states for this evaluation, or None when they must be computed."""
        ...

    def store(self, hidden: Tensor) -> None:
        """The hidden states computed for this evaluation."""
        ...


class NoCache:
    """Every step is computed."""

    def predict(self) -> Tensor | None:
        return None

    def store(self, hidden: Tensor) -> None:
        pass


class TaylorSeer:
    """Taylor extrapolation of the decoder's last hidden states (arXiv 2503.06923) with upstream's settings.

    Evaluations 0 to 4, then every third, are computed. From evaluation 4 on each computed one updates the finite
    differences D(i+1) = (new D(i) - old D(i)) / distance; the others are predicted as sum of D(i) * x^i / i!.
    """

    FIRST_COMPUTED = 5
    INTERVAL = 3
    MAX_ORDER = 6

    def __init__(self) -> None:
        self.evaluation = 0
        self.last_computed = 0
        self.differences: list[Tensor] = []

    def predict(self) -> Tensor | None:
        since_start = self.evaluation - (self.FIRST_COMPUTED - 1)
        if since_start <= 0 or since_start % self.INTERVAL == 0:
            return None
        x = self.evaluation - self.last_computed
        self.evaluation += 1
        predicted = self.differences[0]
        for order, difference in enumerate(self.differences[1:], start=1):
            predicted = predicted + difference * (x**order / math.factorial(order))
        return predicted

    def store(self, hidden: Tensor) -> None:
        updated = [hidden]
        if self.evaluation >= self.FIRST_COMPUTED - 1:
            distance = self.evaluation - self.last_computed
            for old in self.differences[: self.MAX_ORDER]:
                updated.append((updated[-1] - old) / distance)
        self.differences = updated
        self.last_computed = self.evaluation
        self.evaluation += 1


STEP_CACHES: dict[str, type[NoCache] | type[TaylorSeer]] = {"none": NoCache, "taylorseer": TaylorSeer}
