"""Step caches: predict the decoder's output on some steps instead of computing it. One per guidance branch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class StepCache(Protocol):
    """Told of every evaluation of its branch, in order: `predict` or `after_first_layer` answers it, or `store` is
    called."""

    def predict(self) -> Tensor | None:
        """The branch's hidden states for this evaluation, or None when they must be computed."""
        ...

    def after_first_layer(self, entering: Tensor, leaving: Tensor) -> Tensor | None:
        """The same once the first layer is computed; `entering` and `leaving` are the hidden states around it."""
        ...

    def store(self, hidden: Tensor) -> None:
        """The hidden states computed for this evaluation."""
        ...


class NoCache:
    """Every step is computed."""

    def predict(self) -> Tensor | None:
        return None

    def after_first_layer(self, entering: Tensor, leaving: Tensor) -> Tensor | None:
        return None

    def store(self, hidden: Tensor) -> None:
        pass


class FirstBlock:
    """Skips the layers behind the first while the first changes its input as it did when all were last computed.

    What the other layers add to the hidden states is kept from then. The change is measured as the mean of
    |residual - residual then| over the mean of |residual then|, where the residual is what the first layer adds; below
    `threshold` the layers are skipped. The decision needs the number on the host, which waits for the device once an
    evaluation. The idea is ParaAttention's first-block cache.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.first: Tensor | None = None
        """What the first layer added when all layers were last computed."""
        self.rest: Tensor | None = None
        """What the others added then."""
        self._pending: tuple[Tensor, Tensor] | None = None

    def predict(self) -> Tensor | None:
        return None

    def after_first_layer(self, entering: Tensor, leaving: Tensor) -> Tensor | None:
        residual = leaving - entering
        if self.first is not None and self.rest is not None:
            change = (residual - self.first).abs().float().mean() / self.first.abs().float().mean()
            if float(change) < self.threshold:
                return leaving + self.rest
        self._pending = (residual, leaving.clone())  # going on overwrites it
        return None

    def store(self, hidden: Tensor) -> None:
        assert self._pending is not None, "after_first_layer was not asked"
        self.first, leaving = self._pending
        self.rest = hidden - leaving
        self._pending = None


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

    def after_first_layer(self, entering: Tensor, leaving: Tensor) -> Tensor | None:
        return None

    def store(self, hidden: Tensor) -> None:
        updated = [hidden]
        if self.evaluation >= self.FIRST_COMPUTED - 1:
            distance = self.evaluation - self.last_computed
            for old in self.differences[: self.MAX_ORDER]:
                updated.append((updated[-1] - old) / distance)
        self.differences = updated
        self.last_computed = self.evaluation
        self.evaluation += 1


def step_caches(name: str, threshold: float) -> Callable[[], StepCache]:
    """What makes a branch's cache of a kind, one of `settings.STEP_CACHES`; `threshold` is for the kind with one."""
    kinds: dict[str, Callable[[], StepCache]] = {
        "none": NoCache,
        "taylorseer": TaylorSeer,
        "first-block": lambda: FirstBlock(threshold),
    }
    return kinds[name]
