"""Pictures that nobody waits for, drawn with pauses: at full speed they take the processor from what is tried
meanwhile, and from other tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from lowmem_bagel.sampling.denoise import PictureSampler, Step

LONG = 2000
"""Timesteps from which a picture is one that is stopped before it is done."""
PAUSE = 0.05
"""Seconds, some ten times what a step takes."""


def pause_in_long_pictures(patch: pytest.MonkeyPatch) -> None:
    run = PictureSampler.run

    def unhurried(
        self: PictureSampler, noise: Any, count: int, shift: float, on_step: Callable[[Step], None], show: Any
    ) -> Any:
        def paused(step: Step) -> None:
            time.sleep(PAUSE)
            on_step(step)

        return run(self, noise, count, shift, on_step if count < LONG else paused, show)

    patch.setattr(PictureSampler, "run", unhurried)
