"""Processes that kill themselves before a step that changes what is on disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


class DurableSteps:
    """Counts calls of functions of `os`, from 0; before that of number `kill_at` the process kills itself.

    They are replaced for good: this is for processes of their own.
    """

    def __init__(self, kill_at: int | None, *names: str) -> None:
        self.count, self._kill_at = 0, kill_at
        for name in names:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if self.count == self._kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            self.count += 1
            return function(*args, **kwargs)

        return step
