"""A report's rows measured one after the other, each where nothing that goes wrong ends the run. No torch here: the
card is the children's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_bagel.errors import SettingError

from ..rows import Row
from .child import Child, Ended
from .matrix import QUICK_TIMESTEPS, text_of
from .store import Record, Store

LOAD_SECONDS = 12.0
"""What a row takes beside its runs, as far as it is known beforehand: measured for 7B on an H200 (loading, warming up,
and checking kernels once a process)."""
ROW_FACTOR, ROW_SLACK = 4.0, 600.0
"""A row is ended after so many times its seconds, and so many seconds more: for loading from a slow disk."""
PART_OF_ROW = 0.4
"""A picture expected to take a larger share of a row's seconds is measured in part: there is a warm-up too."""

Expected = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """A row to measure: `row` as it is written, whose format may stand for a folder; `timesteps` of it, 0 for all."""

    row: Row
    folder: Path | None
    timesteps: int
    cold: bool
    expected: Expected

    @property
    def text(self) -> str:
        return text_of(self.row)

    @property
    def own(self) -> dict[str, Any]:
        """The row as a worker takes it."""
        return asdict(self.row if self.folder is None else replace(self.row, format=str(self.folder)))


def jobs(
    found: Sequence[tuple[Row, Expected]], folders: Mapping[str, Path], num_timesteps: int, row_seconds: float,
    quick: bool,
) -> list[Job]:  # fmt: skip
    """What is to be done of rows and expectations. The first of each format is loaded cold too, if it is on disk."""
    made, seen = [], set[str]()
    for row, expected in found:
        folder = folders.get(row.format)
        cold = folder is not None and row.format not in seen and not quick and "refused" not in expected
        seen.add(row.format)
        steps = _timesteps(row, expected, num_timesteps, row_seconds, quick)
        made.append(Job(row, folder, steps, cold, expected))
    return made


def _timesteps(row: Row, expected: Expected, num_timesteps: int, row_seconds: float, quick: bool) -> int:
    if row.timesteps or row.task == "ask" or row.step_cache != "none":  # a cache computes few of many steps
        return 0
    seconds = (expected.get("predicted") or {}).get("seconds", 0.0)
    long = seconds > PART_OF_ROW * row_seconds
    return QUICK_TIMESTEPS if (quick or long) and num_timesteps > QUICK_TIMESTEPS else 0


def about_seconds(todo: Iterable[Job], num_timesteps: int, repeat: int) -> float:
    """How long rows will take, by what the planner expects; what it knows nothing of counts as loading alone."""
    total = 0.0
    for job in todo:
        if "refused" in job.expected:
            continue
        seconds = (job.expected.get("predicted") or {}).get("seconds", 0.0)
        share = (job.timesteps or num_timesteps) / num_timesteps
        total += LOAD_SECONDS * (2 if job.cold else 1) + seconds * share * repeat + seconds * 2 / num_timesteps
    return total


class Run:
    """Measures jobs and keeps what is found. A format's rows share a process, which is made anew after a failure."""

    def __init__(self, child: Child, store: Store, row_seconds: float, say: Callable[[str], None]) -> None:
        self.child, self.store, self.row_seconds, self.say = child, store, row_seconds, say

    def all(self, todo: Sequence[Job], order: Sequence[str]) -> None:
        before = ""
        for number, job in enumerate(todo, 1):
            if self.child.used and (job.row.format != before or job.cold):
                self.child.stop()
            before = job.row.format
            row = self.one(job)
            self.store.add(row, order)
            self.say(f"{number:3d}/{len(todo)} {line(row)}")

    def one(self, job: Job) -> Record:
        """A row of the record."""
        start = time.perf_counter()
        found = self._found(job)
        if found["state"] in ("failed", "out of memory"):
            self.child.stop()
        row = job.row
        return {
            "row": job.text, "format": row.format, "limit_gb": row.limit_gb, "task": row.task, "backend": row.backend,
            "offload": row.offload, "step_cache": row.step_cache, "dtype": row.dtype, "lora": row.lora,
            "predicted": job.expected.get("predicted"), **found, "wall_seconds": time.perf_counter() - start,
        }  # fmt: skip

    def _found(self, job: Job) -> Record:
        if "refused" in job.expected:
            return {"state": "not here", "why": job.expected["refused"]}
        limit = ROW_FACTOR * self.row_seconds + ROW_SLACK
        try:
            return self.child.ask("measure", limit, row=job.own, timesteps=job.timesteps, cold=job.cold)
        except Ended as end:
            return {"state": "out of memory" if end.memory else "failed", "why": str(end)}
        except SettingError as refusal:
            return {"state": "not here", "why": str(refusal)}


def line(row: Record) -> str:
    """A row in one line; GB are of tensors, of PyTorch, of the process or card, and as predicted."""
    shown = f"{row['row']:36s} "
    if row["state"] != "measured":
        return f"{shown}{row['state']}: {row['why']}"
    expected, nbytes = row["predicted"] or {}, row["bytes"]
    taken = (nbytes["allocated"], nbytes["reserved"], nbytes["process"] or nbytes["device"], expected.get("peak_bytes"))
    parts = [f"{row['seconds']['median']:.2f} s"]
    parts += [f"({expected['seconds']:.2f} predicted)"] if expected else []
    parts += [f"{', '.join('-' if n is None else f'{n / 1e9:.2f}' for n in taken)} GB"]
    parts += [f"RAM {nbytes['ram'] / 1e9:.2f} GB"] if nbytes["ram"] else []
    parts += [f"{row['tokens_per_second']:.1f} tokens/s"] if row.get("tokens_per_second") else []
    parts += [f"{row['energy_joules']:.0f} J"] if row.get("energy_joules") else []
    return shown + " ".join(parts + ([row["extrapolated"]] if row["extrapolated"] else []))
