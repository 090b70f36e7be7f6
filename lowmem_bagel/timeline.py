"""Where the seconds of a start go, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Timeline:
    """Seconds by phase, in the order in which they ended; written by one thread.

    began: when it did, in seconds since 1970, so that whoever started the process knows what was before.
    reached: seconds from then until something was there for the first time.
    read_bytes: of weights, from files.
    """

    began: float = field(default_factory=time.time)
    phases: dict[str, float] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)
    read_bytes: int = 0
    _inner: list[float] = field(default_factory=list, repr=False)
    """Seconds of the phases inside each one that is open."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase. A repeated name adds up; what phases inside it take is theirs alone."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.phases[name] = self.phases.get(name, 0.0) + seconds - self._inner.pop()
            if self._inner:
                self._inner[-1] += seconds

    def reach(self, name: str) -> None:
        """Say that something is there; later times do not count."""
        self.reached.setdefault(name, time.time() - self.began)

    def to_json(self) -> dict[str, Any]:
        found = {"began": self.began, "phases": dict(self.phases), "reached": dict(self.reached)}
        return {**found, "read_bytes": self.read_bytes}
