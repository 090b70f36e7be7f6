"""The first-block cache: the idea is ParaAttention's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Setting, StepCache

if TYPE_CHECKING:
    from torch import Tensor


class FirstBlock:
    """Skips the layers behind the first while the first changes its input as it did when all were last computed.

    What the other layers add to the hidden states is kept from then. The change is measured as the mean of
    |residual - residual then| over the mean of |residual then|, where the residual is what the first layer adds; below
    the threshold the layers are skipped. The decision needs the number on the host, which waits for the device once an
    evaluation.
    """

    def __init__(self, step_cache_threshold: float) -> None:
        self.threshold = step_cache_threshold
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


FIRST_BLOCK = StepCache(
    "first-block",
    "a step runs the first layer, and the others only if it changed by more than step_cache_threshold",
    FirstBlock,
    stored=lambda evaluations: 2,
    depends_on_picture=True,
    settings=(
        Setting(
            "step_cache_threshold", 0.05, 0.0, 1e3,
            "first-block: change of the first layer below which the others are skipped; 0 skips none",
        ),
    ),
    pending=2,
)  # fmt: skip
