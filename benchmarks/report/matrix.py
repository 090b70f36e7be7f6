"""Which rows a report has: formats x limits x tasks, and single rows beside them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lowmem_bagel.errors import SettingError
from lowmem_bagel.formats.registry import format_spec, formats, packages
from lowmem_bagel.sampling.step_caches.registry import step_caches
from lowmem_bagel.settings import TASKS

from ..rows import Row

CARDS_GB = (24.0, 16.0, 12.0, 8.0, 6.0)
"""Memory of well-known cards."""
ROOM = 1.1e9
"""Bytes for each of their GB that a larger card has: a card's own GB are 2**30 bytes, less what its driver keeps."""
FORMATS = ("source", "dfloat11", "int8", "nf4", "gguf-q4_k")
"""Of random weights, where none are named."""
LORA_RANK = 64
"""As adapters for BAGEL have it."""
QUICK_TIMESTEPS = 8
"""Steps enough that their mean stands for the others', the first being no different."""
QUICK_TASKS = ("generate", "ask")
ACCELERATE = {"generate": 3, "edit": 3, "ask": 16}
"""Timesteps, and tokens, of rows with accelerate's offload, which takes minutes for a picture."""
ARITHMETIC = "float16"


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    limits: of GPU memory in 1e9 bytes, 0 for none; None for those of cards that are smaller than the one here. quick:
    no rows beside formats, limits and tasks. alone: these rows and no others, if there are any.
    """

    formats: Sequence[str]
    limits: Sequence[float] | None = None
    tasks: Sequence[str] = TASKS
    quick: bool = False
    alone: Sequence[Row] = ()

    @classmethod
    def asked(
        cls, formats: Sequence[str], limits: str | None, tasks: str | None, rows: str | None, quick: bool
    ) -> Wanted:
        """From the words of a command.

        Raises:
            SettingError: a limit is no size, or a task, a variant or a step cache unknown.
        """
        usual = QUICK_TASKS if quick else TASKS
        return cls(
            formats,
            (0.0,) if limits is None and quick else None if limits is None else numbers(limits),
            usual if tasks is None else names(tasks, TASKS, "task"),
            quick,
            () if rows is None else parsed(rows, formats),
        )

    def rows(self, card_bytes: int) -> list[Row]:
        """Every row of it on a card of so much memory, 0 for none: a format's one after the other."""
        if self.alone:
            return list(self.alone)
        limits = limits_below(card_bytes) if self.limits is None else tuple(self.limits)
        return [row for format in self.formats for row in _of_format(format, limits, self)]


def _of_format(format: str, limits: Sequence[float], wanted: Wanted) -> Iterator[Row]:
    for task in wanted.tasks:
        for limit in sorted(limits, key=lambda limit: -limit if limit else float("-inf")):
            yield Row(format, limit, task)
    if not wanted.quick:
        yield from _beside(format, limits, wanted.tasks)


def _beside(format: str, limits: Sequence[float], tasks: Sequence[str]) -> Iterator[Row]:
    """Step caches, an adapter, other arithmetic, other packages' kernels and accelerate, where they say something."""
    spec = format_spec(format.partition("@")[0])
    if "generate" in tasks and 0 in limits:
        yield from (Row(format, step_cache=name) for name in step_caches() if name != "none")
        yield Row(format, lora=LORA_RANK)
        if not spec.encoded:
            yield Row(format, dtype=ARITHMETIC)
    for backend in (name for name in spec.backends if name in packages()):
        if 0 in limits:
            yield from (Row(format, task=task, backend=backend) for task in tasks if task != "edit")
    if format == "source" and max(limits):
        yield from (Row(format, max(limits), t, offload="accelerate", timesteps=ACCELERATE[t]) for t in tasks)


def text_of(row: Row) -> str:
    """What `Row.parse` reads back."""
    usual = Row(row.format, row.limit_gb, row.task)
    limit = f"{row.limit_gb:g}" if row.limit_gb else ""
    named = (f":{f.name}={getattr(row, f.name)}" for f in fields(Row) if getattr(row, f.name) != getattr(usual, f.name))
    return f"{row.format}:{limit}:{row.task}" + "".join(named)


def limits_below(card_bytes: int) -> tuple[float, ...]:
    """None, and those of well-known cards that are smaller than this one."""
    return (0.0, *(gb for gb in CARDS_GB if gb * ROOM < card_bytes))


def without_idle_limits(found: Sequence[tuple[Row, Mapping[str, Any]]]) -> list[tuple[Row, Mapping[str, Any]]]:
    """Without rows whose limit limits nothing: the same row without one is among them, and needs less by the plan."""
    unlimited = {row: expected for row, expected in found if not row.limit_gb}

    def idle(row: Row) -> bool:
        expected = unlimited.get(replace(row, limit_gb=0.0), {}).get("predicted")
        return bool(row.limit_gb and expected and expected["peak_bytes"] < row.limit_gb * 1e9)

    return [(row, expected) for row, expected in found if not idle(row)]


def numbers(text: str) -> tuple[float, ...]:
    """Limits in GB, commas between.

    Raises:
        SettingError: one is no size.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise SettingError(f"limits {text!r} are not GB with commas between, such as 0,24,12; 0 is none") from None
    if not all(0 <= limit < 1e6 for limit in found):
        raise SettingError(f"limits {text!r} are GB from 0, which is none, up; name others")
    return found


def names(text: str, known: Iterable[str], what: str) -> tuple[str, ...]:
    """Names with commas between.

    Raises:
        SettingError: one is unknown.
    """
    known, found = tuple(known), tuple(part.strip() for part in text.split(",") if part.strip())
    for name in found:
        if name not in known:
            raise SettingError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
    if not found:
        raise SettingError(f"no {what} is named; choose from {', '.join(known)}")
    return found


def parsed(text: str, known: Iterable[str]) -> list[Row]:
    """Rows with blanks between.

    Raises:
        SettingError: a row means nothing, or has a variant, a task or a step cache that is not there.
    """
    found = [Row.parse(part) for part in text.split()]
    for row in found:
        names(row.format, known, "variant")
        names(row.task, TASKS, "task")
        names(row.step_cache, step_caches(), "step cache")
    return found


def known_formats() -> tuple[str, ...]:
    """Formats that random weights can be made in."""
    return tuple(name for name, spec in formats().items() if spec.parts or name in ("source", "dfloat11"))


def formats_of(rows: str | None) -> str | None:
    """The formats that rows name, with commas between."""
    return rows and ",".join(dict.fromkeys(Row.parse(part).format for part in rows.split()))
