"""The process that measures: reads what is asked, a line of JSON each, and answers with one.

It is a process of its own so that memory that runs out, of the card or of the host, and whatever else ends a process,
ends the measuring of one row. What it prints otherwise goes to its stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lowmem_bagel.errors import DoesNotFitError, UserError, first_line, printable

from ..measuring import Conditions, free, measure
from ..rows import Row
from .predicting import Machine
from .rowing import figures_of

PR_SET_PDEATHSIG = 1

Answer = dict[str, Any]


class Worker:
    """Answers one after the other, with what they share: conditions, the machine, references to compare with."""

    def __init__(self) -> None:
        self.conditions: Conditions | None = None
        self.machine: Machine | None = None

    def start(self, device: str, conditions: Mapping[str, Any]) -> Answer:
        """The device made ready, and what a record says of machine and versions."""
        import torch

        from lowmem_bagel.diagnostics.probe import copy_speed

        from ..record import environment

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.machine = Machine.probed(device)
        copies = copy_speed(True, torch.cuda.mem_get_info()[0]) if device != "cpu" else None
        self.conditions = Conditions(device=device, copy_gbps=copies, **conditions)
        profile = self.machine.profile.to_json()
        return {"environment": environment(), "machine": profile, "pinned_copy_gbps": copies}

    def convert(self, source: str, out: str, format: str) -> Answer:
        """A variant made of a checkpoint."""
        from ..conversions import convert

        convert(source, out, format)
        return {}

    def expect(self, rows: list[Mapping[str, Any]]) -> Answer:
        """What the planner expects of each row."""
        assert self.conditions is not None and self.machine is not None
        return {"rows": [self.machine.expects(Row(**row), self.conditions) for row in rows]}

    def measure(self, row: Mapping[str, Any], timesteps: int, cold: bool) -> Answer:
        """One row's figures, or its state and why. `timesteps` (tokens of an answer) are measured of the whole that
        the row is, 0 for all."""
        from .watching import Meters

        assert self.conditions is not None and self.machine is not None
        asked = Row(**row)
        watch = Meters(asked, timesteps, cold, self.machine, self.conditions)
        try:
            found = measure(replace(asked, timesteps=timesteps or asked.timesteps), self.conditions, False, watch)
        except Exception as failure:  # whatever it is, it is what became of this row
            traceback.print_exc()
            return {**watch.sizes, **became(failure)}
        finally:
            free()
        return {"state": "measured", "why": None, **figures_of(found, watch)}


def became(failure: Exception) -> Answer:
    """What an exception makes of a row."""
    import torch

    from lowmem_bagel.errors import Cancelled

    line = printable(f"{type(failure).__name__}: {first_line(failure)}", 400)
    if isinstance(failure, (torch.OutOfMemoryError, MemoryError, DoesNotFitError)):
        return {"state": "out of memory", "why": line}
    if isinstance(failure, Cancelled):
        return {"state": "failed", "why": "it was not done in the seconds that a row has; give it more (--row-seconds)"}
    if isinstance(failure, UserError):
        return {"state": "not here", "why": printable(str(failure), 400)}
    return {"state": "failed", "why": line}


def main() -> None:
    """Serve whoever started this process, and end with it."""
    _end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints, this package or another, the answers stay whole
    worker = Worker()
    does: dict[str, Callable[..., Answer]] = {
        "start": worker.start, "convert": worker.convert, "expect": worker.expect, "measure": worker.measure,
    }  # fmt: skip
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = does[asked.pop("do")](**asked)
        except UserError as refusal:
            answer = {"refused": str(refusal)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _end_with_parent() -> None:
    """Where the one who asks is killed, nobody is left to stop a row that has a minute to go."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
