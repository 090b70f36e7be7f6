"""No step cache: every evaluation is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import StepCache

if TYPE_CHECKING:
    from torch import Tensor


class NoCache:
    """Knows nothing and keeps nothing."""

    def predict(self) -> Tensor | None:
        return None

    def after_first_layer(self, entering: Tensor, leaving: Tensor) -> Tensor | None:
        return None

    def store(self, hidden: Tensor) -> None:
        pass


NONE = StepCache("none", "every step is computed", NoCache, stored=lambda evaluations: 0)
