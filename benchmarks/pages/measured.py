"""Rows of `bench engine` as pages show them: their names in words, and the columns of their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..rows import Row
from ..words import FORMATS as FORMATS
from ..words import LIBRARIES as LIBRARIES
from ..words import WORDS as WORDS
from .page import Records, digits

RUNS = ("engine_h200", "engine_limits_h200", "engine_libraries_h200")
"""The second has rows under a limit and other step caches, the third what libraries take for the same; what is compared
is in the same run."""


@dataclass(frozen=True)
class Measured:
    """The figures of one row in a run, which is its record's name."""

    row: Row
    run: str
    figures: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        return float(self.figures["seconds"]["median"])

    @property
    def limit(self) -> str:
        return f" under {self.row.limit_gb:g} GB" if self.row.limit_gb else ""

    @property
    def words(self) -> str:
        """Such as "bf16, TaylorSeer" or "INT8 under 8 GB"."""
        others = (WORDS[part] for part in (self.row.task, self.row.step_cache, self.row.backend) if part in WORDS)
        return ", ".join([FORMATS[self.row.format] + self.limit, *others])

    @property
    def label(self) -> str:
        """The same, with a star where it is of the second run, and two of the third."""
        return f"{self.words} {'*' * RUNS.index(self.run)}".rstrip().replace("*", r"\*")

    @property
    def result(self) -> str:
        """Tokens a second of an answer, the seconds of a picture."""
        if self.row.task == "ask":
            return f"{self.figures['tokens_per_second']:.0f} tokens/s"
        return f"{digits(self.seconds)} s"


Columns = Mapping[str, Callable[[Measured], str]]


def measured(records: Records, *runs: str) -> dict[str, Measured]:
    """Rows by their text, of the first run that has them."""
    found: dict[str, Measured] = {}
    for run in runs or RUNS:
        for figures in records[run]["results"]:
            found.setdefault(figures["row"], Measured(Row.parse(figures["row"]), run, figures))
    return found


def gigabytes(name: str) -> Callable[[Measured], str]:
    return lambda m: f"{m.figures[name] / 1e9:.1f}"


SECONDS: Columns = {"s": lambda m: digits(m.seconds)}
TOKENS: Columns = {"tokens/s": lambda m: digits(m.figures["tokens_per_second"])}
MEMORY: Columns = {
    "allocated": gigabytes("peak_bytes"),
    "reserved": gigabytes("reserved_bytes"),
    "in use": gigabytes("device_used_bytes"),
}


def card(record: Mapping[str, Any]) -> str:
    return str(record["hardware"]["gpu"]).removeprefix("NVIDIA ")


def size(record: Mapping[str, Any]) -> str:
    return "{0}x{0}".format(record["settings"]["size"])


def beside(records: Records, name: str) -> list[dict[str, Any]]:
    """What other programs took for what a row of ours does."""
    return [figures for figures in records["upstream_h200"]["results"] if figures["beside"] == name]


def about(other: Mapping[str, Any]) -> str:
    return f"about {other['seconds']:g}" if other.get("about") else f"{other['seconds']:g}"
