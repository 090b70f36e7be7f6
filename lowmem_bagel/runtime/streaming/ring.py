"""Which streamed unit lies in which slot, and which is copied next: the order of streaming, without any device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from ...planner.plan import Unit


class SlotRing:
    """Units pass through a few slots in the order of a pass over the layers, again and again.

    Copies run ahead as far as there are idle slots, past the end of a pass into the next one, which is assumed to be
    the same.

    Args:
        slots: how many there are; slots are called 0 to slots - 1.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._idle: deque[int] = deque(range(slots))
        self._loaded: dict[Unit, int] = {}
        self._in_use: list[Unit] = []
        self._sequence: Sequence[Unit] = ()
        self._cursor = 0

    def begin(self, sequence: Sequence[Unit]) -> list[int]:
        """A pass starts that uses these units in this order; returns slots that it took from units not wanted now.

        A pass that was broken off leaves units in use: they are let go.
        """
        taken = self.release()
        self._sequence = sequence
        ahead = set(sequence[: self._slots])
        for unit in [unit for unit in self._loaded if unit not in ahead]:
            taken.append(self._loaded.pop(unit))
            self._idle.append(taken[-1])
        self._cursor = 0
        return taken

    def fill(self, start_copy: Callable[[Unit, int], None]) -> None:
        """Have the units that come next copied into all idle slots, which nothing uses any more."""
        while self._sequence:
            while self._cursor < len(self._sequence) and self._sequence[self._cursor] in self._loaded:
                self._cursor += 1
            unit = self._sequence[self._cursor % len(self._sequence)]
            if not self._idle or unit in self._loaded:
                return
            slot = self._idle.popleft()
            self._loaded[unit] = slot
            self._cursor += 1
            start_copy(unit, slot)

    def acquire(self, unit: Unit) -> int:
        """The slot that holds a unit, or that it is being copied into."""
        self._in_use.append(unit)
        return self._loaded[unit]

    def release(self) -> list[int]:
        """Let go of all units in use; returns their slots, which are idle now."""
        slots = [self._loaded.pop(unit) for unit in self._in_use if unit in self._loaded]
        self._in_use.clear()
        self._idle.extend(slots)
        return slots

    def forget(self) -> list[int]:
        """Let go of every unit, also of those whose copy has only begun; returns their slots, which are idle now."""
        slots = list(self._loaded.values())
        self._loaded.clear()
        self._in_use.clear()
        self._idle.extend(slots)
        return slots
