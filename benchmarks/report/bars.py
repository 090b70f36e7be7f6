"""Plots of bars: where the seconds of a request and of a start go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .looks import Look, plain
from .reading import TASKS, Report, ReportRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BARS = 30
"""Rows of a plot of bars; more would not be read."""
LEAST_SEEN, OTHER = 0.015, "other"
"""Part of the longest bar that a phase must have to be told from the others."""


def said(rows: Sequence[ReportRow]) -> str:
    least, most = min(rows, key=lambda row: row.median), max(rows, key=lambda row: row.median)
    if len(rows) == 1:
        return f"One row: {least.label}, {least.median:.3g} s."
    return (
        f"{len(rows)} rows, from {least.median:.3g} s ({least.label}, one {TASKS.get(least.task, least.task)}) to "
        f"{most.median:.3g} s ({most.label}, one {TASKS.get(most.task, most.task)})."
    )


def other_task(row: ReportRow) -> str:
    return "" if row.task == "generate" else TASKS.get(row.task, row.task)


def _phased(report: Report) -> list[ReportRow]:
    rows = [row for row in report.measured if row.phases and not row.extrapolated]
    if len(rows) > MOST_BARS:
        rows = [row for row in rows if row.is_plain] or rows
    return sorted(rows, key=lambda row: (list(TASKS).index(row.task) if row.task in TASKS else 9, row.median))[
        :MOST_BARS
    ]


def phases(report: Report, look: Look) -> Figure:
    rows = _phased(report)
    bars = [(", ".join(filter(None, (row.label, other_task(row)))), row.phases) for row in rows]
    return _stacked(look, bars, "seconds of a request")


def phases_alt(report: Report) -> str:
    rows = _phased(report)
    return f"Seconds of each phase of a request. {said(rows)}" if rows else ""


def startup(report: Report, look: Look) -> Figure:
    bars = [
        (f"{row.label}, {name}", found)
        for row in report.startup
        for name, found in (("cold", row.cold), ("warm", row.warm))
        if found
    ]
    return _stacked(look, bars[:MOST_BARS], "seconds of the command")


def startup_alt(report: Report) -> str:
    told = [
        f"{row.label} {sum(row.cold.values()):.1f} s cold, {sum(row.warm.values()):.1f} s warm"
        for row in report.startup
    ]
    return f"Seconds of a command for one picture: {'; '.join(told)}." if told else ""


def _stacked(look: Look, bars: Sequence[tuple[str, Any]], unit: str) -> Figure:
    """Horizontal bars of stacked phases, the first bar on top; their sums at their ends."""
    most = max(sum(found.values()) for _, found in bars)
    bars = [(words, _seen(found, most)) for words, found in bars]
    names = sorted(dict.fromkeys(name for _, found in bars for name in found), key=OTHER.__eq__)
    colors = {name: look.grid if name == OTHER else look.phase(place) for place, name in enumerate(names)}
    named = 0.2 * (look.legend_lines(names) - 1)
    figure, (axes,) = look.figure(1.2 + named + (0.42 if look.narrow else 0.27) * len(bars))
    tall = 0.42 if look.narrow else 0.68
    for place, (words, found) in enumerate(bars):
        label = plain(words)
        start = 0.0
        for name in names:
            took = found.get(name, 0.0)
            axes.barh(
                place,
                took,
                left=start,
                height=tall,
                color=colors[name],
                edgecolor=look.paper,
                linewidth=0.6,
            )
            start += took
        if look.narrow:  # beside the axis there is no room for the labels
            axes.annotate(
                label, (0, place - tall / 2), xytext=(1, 1), textcoords="offset points", va="bottom",
                fontsize=look.text_size - 1, color=look.ink,
            )  # fmt: skip
        axes.annotate(
            _seconds(start), (start, place), xytext=(3, 0), textcoords="offset points", va="center",
            fontsize=look.text_size - 1, color=look.ink,
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), ["" if look.narrow else plain(label) for label, _ in bars])
    axes.set_ylim(len(bars) - 0.4, -0.75)
    axes.set_xlim(0, most * 1.13)
    axes.grid(axis="y", visible=False)
    look.name(axes, unit)
    from matplotlib.patches import Patch

    look.legend(figure, [(Patch(color=colors[name]), name) for name in names])
    return figure


def _seen(phases: Mapping[str, float], most: float) -> dict[str, float]:
    """Phases too short to be seen beside the longest bar, together, as the last one."""
    seen = {name: took for name, took in phases.items() if name != OTHER and took >= LEAST_SEEN * most}
    rest = sum(phases.values()) - sum(seen.values())
    return {**seen, OTHER: rest} if seen.keys() != phases.keys() else seen


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
