"""What a report knows of a row beside what `measuring` measures: loading from disk, energy, memory, the first token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lowmem_bagel.generation.executor import Token
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.load_options import options_from

from ..measuring import Watch, load_settings
from ..rows import Row
from .meters import RamMeter, card_meter
from .models import drop_from_cache, files, sizes
from .predicting import Machine, prediction

if TYPE_CHECKING:
    from lowmem_bagel.checkpoint.folder import ModelFolder
    from lowmem_bagel.generation.results import Result
    from lowmem_bagel.pipeline import BagelPipeline

    from ..measuring import Conditions, Request


class Meters(Watch):
    """Watches one row.

    Args:
        row: the whole; of which `shortened` timesteps (tokens of an answer) are measured, 0 for all.
        cold: whether it is loaded once before it is measured, with its files out of the page cache.
    """

    def __init__(self, row: Row, shortened: int, cold: bool, machine: Machine, conditions: Conditions) -> None:
        self.row, self.shortened, self.cold = row, shortened or row.timesteps, cold
        self.machine, self.conditions = machine, conditions
        self.ram = RamMeter()
        self.sizes: dict[str, int] = {}
        self.cold_seconds: float | None = None
        self.on_disk = False
        self._joules: list[float] = []
        self._first: list[float] = []
        self._copied: list[int] = []

    @property
    def steps(self) -> int:
        """Evaluations of the sampler that are measured."""
        return (self.shortened or self.conditions.num_timesteps) - 1

    def opened(self, folder: ModelFolder, load: Callable[[], BagelPipeline]) -> None:
        self.sizes = sizes(folder)
        self.on_disk = drop_from_cache(folder) if self.cold else bool(files(folder))
        self.facts = ModelFacts.of_folder(folder)
        if self.cold and self.on_disk:
            start = time.perf_counter()
            pipe = load()
            self.cold_seconds = time.perf_counter() - start
            pipe.close()
            del pipe
        self.ram.begin()

    def run(self, pipe: BagelPipeline, request: Request) -> Result:
        first: list[float] = []

        def follow(event: object) -> None:
            if isinstance(event, Token) and not first:
                first.append(time.perf_counter())

        self.card = card_meter(pipe.model.bagel.device)
        copied, before = pipe.model.residency.copied_bytes, self.card.joules()
        start = time.perf_counter()
        result = request(follow)
        after = self.card.joules()
        if before is not None and after is not None:
            self._joules.append(after - before)
        self._first += [moment - start for moment in first]
        if copied is not None:
            self._copied.append((pipe.model.residency.copied_bytes or 0) - copied)
        return result

    def seen(self, pipe: BagelPipeline, done: Sequence[Result]) -> dict[str, Any]:
        """Energy and copies are of what was measured, and None where that is not the whole."""
        joules, copied = ([], []) if self.shortened else (self._joules, self._copied)
        ram = self.ram.peak()
        found = {
            "process_bytes": self.card.process_bytes(),
            "device_bytes": self.card.device_bytes(),
            "ram_bytes": ram,
            "copied_bytes": _median(copied),
            "energy_joules": _median(joules),
            "energy_why": None if joules else self.card.why.get("energy", "only a part was measured"),
            "first_token_seconds": _median(self._first),
            "expected": self._expected(pipe, len(done[-1].token_ids)),
        }
        return found | {"meters_why": self.card.why | ({"ram": self.ram.why} if self.ram.why else {})}

    def _expected(self, pipe: BagelPipeline, tokens: int) -> Any:
        """What the plan that it ran under expects; of an answer that ended, of its own length."""
        inputs = self.machine.inputs(self.facts, options_from(load_settings(self.row, self.conditions)))
        length = self.conditions.max_new_tokens if tokens == self.shortened else tokens
        return prediction(pipe.model.plan, inputs, self.row, self.conditions, length)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
