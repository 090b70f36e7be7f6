"""What a format, attention or a step cache loses, as far as records tell: `fidelity.json`, which `bench pages` makes of
them. No torch.

Measured on the demo checkpoint: the relative error of what a decoder's linear gives, over all of its linears, on its
own activations; and how many of the tasks (answers, drawings, edits) that are judged turn out right, in points
(hundredths of all) beside the source's. On a larger model's real weights nothing of this was measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..formats.spec import FormatSpec
from ..ops.attention.registry import attention_backends
from ..settings import Task

DATA = Path(__file__).with_name("fidelity.json")
ROUNDING = 2.0**-9
"""What bfloat16 rounds by; a linear's output that is nearer than that loses nothing that bf16 would keep."""
LARGEST_ERROR = 0.03
"""Of a linear's output, the median of the demo checkpoint's: a loss within bounds."""
JUDGED: Mapping[Task, str] = {"generate": "drawings", "edit": "edits", "ask": "answers"}
"""What the demo checkpoint was judged by, by task."""
MOST_POINTS = 2.0
"""Points of a task lost against the source: a loss within bounds."""


@dataclass(frozen=True)
class Loss:
    """What one lossy choice costs. `error`: median relative L2 of a linear's output; `points`: what the task lost, 0
    where it did not; None where it was not measured."""

    name: str
    error: float | None = None
    points: float | None = None

    @property
    def negligible(self) -> bool:
        return self.error is not None and self.error <= ROUNDING and not self.points

    @property
    def bounded(self) -> bool:
        """Measured, and within both bounds."""
        return (
            (self.error, self.points) != (None, None)
            and (self.error or 0.0) <= LARGEST_ERROR
            and (self.points or 0.0) <= MOST_POINTS
        )

    @property
    def words(self) -> str:
        """Such as "int8 1.1%, 0 points"."""
        error = [] if self.error is None else [f"{self.error:.1%}"]
        points = [] if self.points is None else [f"{self.points:g} points"]
        return f"{self.name} {', '.join([*error, *points]) or 'not measured'}"


def losses(spec: FormatSpec, dtype: str, attention: str, step_cache: str, task: Task) -> tuple[Loss, ...]:
    """What a task loses by a format, by arithmetic in `dtype`, by an attention backend and by a step cache; what is
    negligible is left out."""
    return tuple(loss for loss in _losses(spec, dtype, attention, step_cache, JUDGED[task]) if not loss.negligible)


def _losses(spec: FormatSpec, dtype: str, attention: str, step_cache: str, judged: str) -> Iterator[Loss]:
    known = measured()
    if not spec.lossless:
        yield _loss(spec.name, known["formats"], judged)
    elif dtype == "float16":  # as the fp16 variant is measured: its weights, and the arithmetic that it is run with
        yield _loss("fp16", known["formats"], judged)
    backend = attention_backends().get(attention)
    if backend is not None and backend.lossy:
        found = _loss(attention, known["attention"], judged)
        yield replace(found, name=f"attention {attention}")
    if step_cache != "none":
        yield _loss(step_cache, known["step_caches"], judged)


def _loss(name: str, known: Mapping[str, Any], judged: str) -> Loss:
    found = known.get(name, {})
    points = found.get("points", {}).get(judged)
    return Loss(name, found.get("output_error"), None if points is None else max(0.0, -points))


@cache
def measured() -> Mapping[str, Any]:
    """The data that comes with the package."""
    found: Mapping[str, Any] = json.loads(DATA.read_text(encoding="utf-8"))
    return found
