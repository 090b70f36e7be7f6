"""The report's tables, as plain cells that a page of HTML and one of Markdown show alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..words import digits
from .reading import MEMORY, TASKS, Fidelity, Report, ReportRow, Startup, title_of

NONE = "–"
TOLD = 0.05
"""Seconds from which on a phase of the start is named."""
BUDGETS = (6, 8, 12, 16, 24, 40)
"""GB of cards that people have."""


@dataclass(frozen=True)
class Table:
    """`heads`: with units. `rows`: cells; each row's first names it. `note`: what the cells do not say."""

    name: str
    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def number(value: float | None, make: Callable[[float], str] = digits) -> str:
    return NONE if value is None else make(value)


def _gigabytes(value: float | None) -> str:
    return number(value, lambda found: f"{found / 1e9:.2f}")


def off(expected: float | None, found: float | None) -> str:
    """A prediction against what was found, such as "8.90 (+3%)"."""
    if expected is None:
        return NONE
    return digits(expected) + (f" ({expected / found - 1:+.0%})" if found else "")


def _table(
    name: str, title: str, columns: dict[str, Callable[[Any], str]], rows: Iterable[Any], note: str = ""
) -> Table:
    """Columns in which no row has anything are left out."""
    cells = [[make(row) for make in columns.values()] for row in rows]
    kept = [n for n in range(len(columns)) if not cells or any(line[n] != NONE for line in cells)]
    return Table(name, title, [list(columns)[n] for n in kept], [[line[n] for n in kept] for line in cells], note)


def task_words(row: ReportRow) -> str:
    return TASKS.get(row.task, row.task)


def measured(report: Report) -> Table:
    """Every row, measured or not."""

    def seconds(row: ReportRow) -> str:
        return digits(row.median) + ("*" if row.extrapolated else "") if row.is_measured else NONE

    def spread(row: ReportRow) -> str:
        found = row.seconds
        return f"{digits(found.least)} to {digits(found.most)}" if found and found.least < found.most else NONE

    def held(key: str) -> Callable[[ReportRow], str]:
        return lambda row: _gigabytes(row.bytes.get(key))

    columns: dict[str, Callable[[ReportRow], str]] = {
        "variant": lambda row: row.label,
        "task": task_words,
        "state": lambda row: row.state,
        "s": seconds,
        "least to most, s": spread,
        "step, ms": lambda row: number(row.step_seconds, lambda found: digits(found * 1e3)),
        "tokens/s": lambda row: number(row.tokens_per_second),
        "first token, s": lambda row: number(row.first_token_seconds),
        "load cold, s": lambda row: number(row.load_cold),
        "load warm, s": lambda row: number(row.load_warm),
        **{f"{name}, GB": held(name) for name in ("allocated", "reserved", "process", "device", "ram", "copied")},
        "on disk, GB": lambda row: _gigabytes(row.stored_bytes),
        "energy, J": lambda row: number(row.energy_joules, lambda found: f"{found:.0f}"),
        "row": lambda row: row.row,
        "commit, if another": lambda row: row.commit or NONE,
    }
    notes = [f"{row.label}: {row.extrapolated}" for row in report.rows if row.extrapolated]
    why = sorted({row.energy_why for row in report.rows if row.energy_why and row.energy_joules is None})
    star = f" * Extrapolated: {'; '.join(notes)}." if notes else ""
    energy = f" Energy is not known everywhere: {'; '.join(why)}." if why else ""
    return _table("rows", "All rows", columns, report.rows, f"GB are 1e9 bytes, at the peak.{star}{energy}")


def lost(report: Report) -> Table:
    columns: dict[str, Callable[[ReportRow], str]] = {
        "variant": lambda row: row.label,
        "task": task_words,
        "what happened": lambda row: row.state,
        "why": lambda row: row.why or NONE,
    }
    rows = [row for row in report.rows if not row.is_measured]
    return _table("not measured", "Not measured", columns, rows)


def predictions(report: Report) -> Table:
    columns: dict[str, Callable[[ReportRow], str]] = {
        "variant": lambda row: row.label,
        "task": task_words,
        "measured, s": lambda row: digits(row.median),
        "predicted, s": lambda row: off(row.predicted_seconds, row.median),
        "measured, GB": lambda row: number(row.held),
        "predicted, GB": lambda row: off(None if row.predicted_bytes is None else row.predicted_bytes / 1e9, row.held),
    }
    rows = [row for row in report.measured if row.predicted_seconds or row.predicted_bytes]
    return _table("predictions", "Predicted and measured", columns, rows, "In brackets: how far the prediction is off.")


def fidelity(report: Report) -> Table:
    def score(value: Callable[[Fidelity], float | None], exact: str, form: str) -> Callable[[Fidelity], str]:
        return lambda found: (
            exact if found.exact else number(value(found), lambda x: "equal" if math.isinf(x) else format(x, form))
        )

    columns: dict[str, Callable[[Fidelity], str]] = {
        "variant": lambda found: found.title,
        "kind": lambda found: found.kind,
        "bits": lambda found: "the same" if found.exact else found.state if found.state != "measured" else "others",
        "KL mean, nats": score(lambda found: found.kl_mean, "0", ".2e"),
        "KL most, nats": score(lambda found: found.kl_max, "0", ".2e"),
        "greedy answers agree": score(lambda found: found.agreement, "100.0%", ".1%"),
        "PSNR median, dB": score(lambda found: found.psnr_median, "equal", ".1f"),
        "PSNR worst, dB": score(lambda found: found.psnr_worst, "equal", ".1f"),
        "SSIM median": score(lambda found: found.ssim_median, "1", ".4f"),
        "perceptual": lambda found: number(found.perceptual, lambda x: f"{x:.4f} ({found.perceptual_name})"),
        "first velocity, plain": score(lambda found: found.first_plain, "0", ".2g"),
        "first velocity, guided": score(lambda found: found.first_guided, "0", ".2g"),
        "right on the demo": lambda found: ", ".join(f"{n} {right}" for n, right in found.accuracy.items()) or NONE,
        "why not": lambda found: found.why or NONE,
    }
    missing = sorted({found.perceptual_missing for found in report.fidelity if found.perceptual_missing})
    lacking = f" No perceptual distance: {'; '.join(missing)}." if missing else ""
    note = f"Against the source, from the same seeds. First velocity: relative L2 of the first step's.{lacking}"
    return _table("fidelity", "Fidelity", columns, report.fidelity, note)


def startup(report: Report) -> Table:
    def spent(phases: Any) -> str:
        told = (f"{name} {digits(seconds)}" for name, seconds in phases.items() if seconds >= TOLD)
        return ", ".join(told) or NONE

    columns: dict[str, Callable[[Startup], str]] = {
        "variant": lambda row: row.label + (f" ({row.cores:.0f} cores, {row.commit})" if row.cores else ""),
        "to the first step, cold, s": lambda row: number(row.cold_first_step),
        "warm, s": lambda row: number(row.warm_first_step),
        "to the end, cold, s": lambda row: number(sum(row.cold.values()) or None),
        "warm, s ": lambda row: number(sum(row.warm.values()) or None),
        "where, cold, s": lambda row: spent(row.cold),
        "where, warm, s": lambda row: spent(row.warm),
    }
    note = f"A command for one picture, in a process of its own; phases of {TOLD:g} s and more."
    return _table("start-up", "Start-up", columns, report.startup, note)


def elsewhere(report: Report) -> Table:
    """Predictions, a line a card."""
    rows = [row for row in report.elsewhere if row["task"] == "generate"]
    found = {(row["card"], row["format"]): row for row in rows}
    formats = dict.fromkeys(format for _, format in found)

    def cell(format: str) -> Callable[[str], str]:
        def make(card: str) -> str:
            row = found[card, format]
            return f"{row['seconds']:.0f} s, {row['peak_bytes'] / 1e9:.1f} GB" if row["fits"] else "does not fit"

        return make

    columns: dict[str, Callable[[str], str]] = {"card": str, **{title_of(f): cell(f) for f in formats}}
    note = "Predictions of the planner from nominal rates, for one picture of the published model: nothing is measured."
    return _table("elsewhere", "Cards that are not here (predicted)", columns, dict.fromkeys(c for c, _ in found), note)


def within(report: Report) -> Table:
    """For cards of several sizes, the quickest of the pictures' rows that stayed within them."""
    known = [row for row in report.measured if row.task == "generate" and report.memory(row) and not row.extrapolated]
    exact = {found.name for found in report.fidelity if found.exact} | {"source", "bf16", "dfloat11"}

    def quickest(rows: Iterable[ReportRow]) -> str:
        best = min(rows, key=lambda row: row.median, default=None)
        return NONE if best is None else f"{best.label}: {digits(best.median)} s, {report.memory(best):.1f} GB"

    def inside(budget: int) -> list[ReportRow]:
        return [row for row in known if (report.memory(row) or 0) <= budget]

    columns: dict[str, Callable[[int], str]] = {
        "a card of": lambda budget: f"{budget} GB",
        "the source's bits": lambda budget: quickest(
            row for row in inside(budget) if row.format in exact and row.is_plain
        ),
        "no step cache": lambda budget: quickest(row for row in inside(budget) if row.step_cache == "none"),
        "quickest": lambda budget: quickest(inside(budget)),
    }
    most = max((report.memory(row) or 0 for row in known), default=0)
    budgets = [budget for n, budget in enumerate(BUDGETS) if not n or BUDGETS[n - 1] < most] if known else []
    note = (
        f"The quickest measured row that stayed within so much ({MEMORY[report.memory_key]}), with this machine's "
        "arithmetic and copies; the same memory on a slower card takes longer."
    )
    return _table("within", "Which for how much memory", columns, budgets, note)
