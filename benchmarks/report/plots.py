"""The report's plots, each a function of the record and of how it is to look. Nothing else is drawn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .bars import other_task, phases, phases_alt, said, startup, startup_alt
from .depth import errors, errors_alt
from .looks import Look, label_points, plain
from .reading import MEMORY, PUBLISHED, TASKS, Report, ReportRow, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED = 7
"""Points outside a band that are named, the farthest ones."""
TIME_BAND, MEMORY_BAND = 0.15, 0.07
"""How far predictions may be off, by the project's own measure."""


@dataclass(frozen=True)
class Plot:
    """`name`: of its file. `alt`: what it shows, in words; empty where the record has nothing to draw."""

    name: str
    title: str
    caption: str
    alt: Callable[[Report], str]
    draw: Callable[[Report, Look], Figure]


# Time against memory


def _points(report: Report, task: str) -> list[ReportRow]:
    return [row for row in report.measured if row.task == task and report.memory(row)]


def time_memory(task: str) -> Callable[[Report, Look], Figure]:
    return lambda report, look: _time_memory(report, look, task)


def _time_memory(report: Report, look: Look, task: str) -> Figure:
    figure, (axes,) = look.figure(4.8 if look.narrow else 5.2)
    rows = _points(report, task)
    axes.set_yscale("log")
    for format in dict.fromkeys(row.format for row in rows):
        color = look.format(format, report.others)
        plain = sorted((report.memory(row) or 0, row.median) for row in rows if row.format == format and row.is_plain)
        if len(plain) > 1:
            axes.plot(*zip(*plain, strict=True), color=color, linewidth=1.2, alpha=0.6)
        bound = _bound(report, format, task)
        if bound:
            axes.plot(*bound, color=color, linewidth=0.9, linestyle="--", alpha=0.8)
    points = []
    for row in rows:
        color, at = look.format(row.format, report.others), report.memory(row) or 0
        axes.plot(
            at, row.median, _shape(row), markersize=6.5, markeredgecolor=color if row.extrapolated else look.paper,
            markeredgewidth=0.8, color=look.paper if row.extrapolated else color,
        )  # fmt: skip
        points.append((at, row.median, _short(row), color))
    _widen(axes, [x for x, *_ in points], [y for _, y, *_ in points])
    _card(report, look, axes)
    _plain_ticks(axes.yaxis)
    look.name(axes, f"{MEMORY[report.memory_key]} at the peak, GB", f"seconds of one {TASKS[task]}")
    look.legend(figure, _time_memory_legend(report, look, rows))
    label_points(axes, look, points)
    return figure


def _time_memory_legend(report: Report, look: Look, rows: Sequence[ReportRow]) -> list[tuple[Any, str]]:
    dot = _dot(look)
    formats = {row.format: row.title for row in rows}
    entries = [(dot(look.format(format, report.others), "o"), title) for format, title in formats.items()]
    shapes = {_shape(row) for row in rows}
    entries += [(dot(look.faint, shape), words) for shape, words in SHAPES.items() if shape in shapes]
    if any(row.extrapolated for row in rows):
        entries.append((dot(look.faint, "o", hollow=True), "extrapolated"))
    return [*entries, (_dashes(look.faint), "bound")]


SHAPES = {
    "o": "no limit", "s": "under a limit", "^": "step cache", "D": "another package", "v": "other arithmetic",
}  # fmt: skip


def _shape(row: ReportRow) -> str:
    if row.step_cache != "none":
        return "^"
    if row.backend != "auto" or row.offload != "native":
        return "D"
    if not row.is_plain:
        return "v"
    return "s" if row.limit_gb else "o"


def _short(row: ReportRow) -> str:
    """What the colors and shapes do not say."""
    limit = [f"{row.limit_gb:g} GB"] if row.limit_gb else []
    package = [name for name, usual in ((row.backend, "auto"), (row.offload, "native")) if name != usual]
    return ", ".join([*limit, *package, *(mark for mark in row.marks if not mark.startswith("by "))])


def _bound(report: Report, format: str, task: str) -> tuple[list[float], list[float]] | None:
    """What could be reached at best with less memory: the resident time, or that of copying what is missing.

    Every step of a picture reads each weight once: what is not on the card is copied at each.
    """
    rows = [row for row in _points(report, task) if row.format == format and row.is_plain]
    resident = next((row for row in rows if not row.limit_gb), None)
    speed, steps = (report.settings.get(name) for name in ("pinned_copy_gbps", "num_timesteps"))
    limited = [report.memory(row) or 0 for row in rows if row.limit_gb]
    if resident is None or not limited or task == "ask" or not isinstance(speed, int | float) or not steps:
        return None
    most, least = report.memory(resident) or 0, min(limited)
    xs = [least + (most - least) * n / 60 for n in range(61)]
    return xs, [max(resident.median, (steps - 1) * (most - x) / speed) for x in xs]


def _card(report: Report, look: Look, axes: Axes) -> None:
    """The end of the card's memory; a note where it is far beyond what was used."""
    total, name = report.card_gb, plain(report.card)
    if total is None:
        return
    low, high = axes.get_xlim()
    if total < 1.6 * high:
        axes.set_xlim(low, max(high, total * 1.04))
        axes.axvline(total, color=look.ink, linewidth=1.3, linestyle=":")
        axes.annotate(
            f"{name}: {total:.0f} GB", (total, 0.98), xytext=(-3, 0), textcoords="offset points",
            xycoords=("data", "axes fraction"), fontsize=look.text_size - 1, color=look.ink,
            ha="right", va="top", rotation=90,
        )  # fmt: skip
    else:
        axes.annotate(
            f"{name} ends at {total:.0f} GB →", (0.99, 0.99), xycoords="axes fraction", ha="right", va="top",
            fontsize=look.text_size - 1, color=look.ink,
        )  # fmt: skip


def time_memory_alt(task: str) -> Callable[[Report], str]:
    def alt(report: Report) -> str:
        rows = _points(report, task)
        if len(rows) < 2:  # one point shows nothing that the table does not
            return ""
        return f"Seconds of one {TASKS[task]} against {MEMORY[report.memory_key]}. {said(rows)}"

    return alt


# Fidelity against size


def _sized(report: Report) -> list[Any]:
    """(variant, GB, whether it is a format): what is no format stands at the source's size."""
    found = []
    for variant in report.fidelity:
        size = variant.stored_bytes / 1e9 if variant.stored_bytes else report.stored(variant.name)
        size = size or report.stored("source")
        if size is not None and (variant.exact or variant.kl_mean is not None or variant.psnr_median is not None):
            found.append((variant, size, variant.kind == "format"))
    return found


def fidelity(report: Report, look: Look) -> Figure:
    figure, (text, picture) = look.figure(4.4, 2)
    sized = _sized(report)
    unit, scale = ("GB", 1) if max(size for _, size, _ in sized) >= 1 else ("MB", 1000)
    kl = [each[0].kl_mean for each in sized if each[0].kl_mean]
    psnr = [x for each in sized if (x := each[0].psnr_median) is not None and math.isfinite(x)]
    # Where nothing differs neither has a place on its axis: a band of its own.
    zero, endless = min(kl, default=1e-4) / 12, max(psnr, default=40.0) + 12
    text.set_yscale("log")
    labels: tuple[list[Any], list[Any]] = [], []
    for variant, size, is_format in sized:
        color = look.format(variant.name, report.others) if is_format else look.faint
        heights = (
            zero if variant.exact or variant.kl_mean == 0 else variant.kl_mean,
            endless if variant.exact or variant.psnr_median == math.inf else variant.psnr_median,
        )
        for axes, height, waiting in zip((text, picture), heights, labels, strict=True):
            if height is not None:
                axes.plot(
                    scale * size,
                    height,
                    "o" if is_format else "^",
                    color=color,
                    markersize=7,
                    markeredgecolor=look.paper,
                )
                waiting.append((scale * size, height, variant.title, color))
    for axes, waiting in zip((text, picture), labels, strict=True):
        _widen(axes, [x for x, *_ in waiting], [y for _, y, *_ in waiting])
    _exact_band(look, text, zero, "no difference", above=False)
    _exact_band(look, picture, endless, "no difference", above=True)
    look.name(text, f"size on disk, {unit}", "KL divergence, nats a token (lower is nearer)", "Text")
    look.name(
        picture, f"size on disk, {unit}", "PSNR against the source, dB (higher is nearer)", "Pictures of the same seeds"
    )
    for axes, waiting in zip((text, picture), labels, strict=True):
        label_points(axes, look, waiting)
    return figure


def _exact_band(look: Look, axes: Axes, at: float, words: str, above: bool) -> None:
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        edges = (min(low, at / 2.5), at * 2.5)
        axes.set_ylim(edges[0], high)
    else:
        edges = (at - 5, max(high, at + 5))
        axes.set_ylim(low, edges[1])
    axes.axhspan(*edges, color=look.grid, alpha=0.6, zorder=0)
    axes.annotate(
        words, (0.015, edges[above]), xycoords=("axes fraction", "data"), va="top" if above else "bottom",
        xytext=(0, -3 if above else 3), textcoords="offset points", fontsize=look.text_size - 1, color=look.faint,
    )  # fmt: skip
    ticks = [tick for tick in axes.get_yticks() if not edges[0] <= tick <= edges[1]]
    axes.set_yticks(ticks)
    axes.set_ylim(*((edges[0], high) if not above else (low, edges[1])))
    axes.minorticks_off()


def fidelity_alt(report: Report) -> str:
    sized = _sized(report)
    if not sized:
        return ""
    exact = [variant.title for variant, *_ in sized if variant.exact]
    apart = [(each[0].title, each[0].psnr_median) for each in sized if each[0].psnr_median is not None]
    told = [f"{title} {found:.1f} dB" for title, found in apart if math.isfinite(found)]
    same, psnr = (", ".join(names) or "none" for names in (exact, told))
    return f"Fidelity against size on disk. The same bits: {same}. PSNR: {psnr}."


# Predicted against measured


def _predicted(report: Report) -> list[ReportRow]:
    return [row for row in report.measured if row.predicted_seconds or row.predicted_bytes]


def predicted(report: Report, look: Look) -> Figure:
    figure, (seconds, memory) = look.figure(4.4, 2)
    rows = _predicted(report)
    times = [(row, row.median, row.predicted_seconds) for row in rows if row.predicted_seconds]
    sizes = [(row, size, row.predicted_bytes / 1e9) for row in rows if (size := row.held) and row.predicted_bytes]
    waiting = [
        _against(report, look, seconds, times, TIME_BAND, "Seconds"),
        _against(report, look, memory, sizes, MEMORY_BAND, "Peak memory, GB"),
    ]
    formats = dict.fromkeys(row.format for row in rows)
    titles = {row.format: row.title for row in rows}
    dot = _dot(look)
    entries = [(dot(look.format(format, report.others), "o"), titles[format]) for format in formats]
    look.legend(figure, entries)
    for axes, points in zip((seconds, memory), waiting, strict=True):
        label_points(axes, look, points)
    return figure


def _against(
    report: Report, look: Look, axes: Axes, pairs: Sequence[tuple[ReportRow, float, float]], band: float, title: str
) -> list[Any]:
    """Points about the diagonal; the labels of those outside the band are left to be written."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    values = [value for _, *both in pairs for value in both] or [1.0]
    edges = [min(values) / 1.4, max(values) * 1.4]
    axes.fill_between(
        edges, [e * (1 - band) for e in edges], [e * (1 + band) for e in edges], color=look.grid, alpha=0.9
    )
    axes.plot(edges, edges, color=look.faint, linewidth=1)
    points = []
    farthest = sorted((abs(expected / measured - 1) for _, measured, expected in pairs), reverse=True)[:MOST_NAMED]
    for row, measured, expected in pairs:
        color = look.format(row.format, report.others)
        axes.plot(measured, expected, "o", color=color, markersize=6, markeredgecolor=look.paper)
        off = expected / measured - 1
        name = ", ".join(filter(None, (row.title, _short(row), other_task(row))))
        points.append(
            (measured, expected, f"{name} {off:+.0%}" if abs(off) > band and abs(off) in farthest else "", color)
        )
    axes.set_xlim(*edges)
    axes.set_ylim(*edges)
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)
    look.name(axes, "measured", "predicted", f"{title}, and {band:.0%} either way")
    return points


def predicted_alt(report: Report) -> str:
    rows = _predicted(report)
    off = [row.predicted_seconds / row.median - 1 for row in rows if row.predicted_seconds]
    return (
        f"Predictions against {len(rows)} measurements; seconds are off by {min(off):+.0%} to {max(off):+.0%}."
        if off
        else ""
    )


# Cards that are not here


def elsewhere(report: Report, look: Look) -> Figure:
    """Hollow: predicted. Filled, on top: measured, where it is the same model."""
    rows = [row for row in report.elsewhere if row["task"] == "generate"]
    cards = list(dict.fromkeys(row["card"] for row in rows))
    formats = list(dict.fromkeys(row["format"] for row in rows))
    here = [row for row in report.measured if row.is_plain and not row.limit_gb and row.task == "generate"]
    here = [row for row in here if row.format in formats] if report.settings.get("shape") == PUBLISHED else []
    figure, (axes,) = look.figure(1.4 + 0.42 * (len(cards) + bool(here)))
    axes.set_xscale("log")

    def put(place: float, format: str, seconds: float, face: str) -> None:
        at = place + (formats.index(format) - (len(formats) - 1) / 2) * 0.16
        axes.plot(seconds, at, "o", markersize=6, color=look.format(format, report.others), markerfacecolor=face)

    for row in here:
        put(-1, row.format, row.median, look.format(row.format, report.others))
    for expected in rows:
        if expected["fits"]:
            put(cards.index(expected["card"]), expected["format"], expected["seconds"], look.paper)
    first = [f"{report.card}, measured"] if here else []
    axes.set_yticks(range(-len(first), len(cards)), list(map(plain, [*first, *cards])))
    axes.set_ylim(len(cards) - 0.45, -0.55 - len(first))
    _plain_ticks(axes.xaxis)
    look.name(axes, "seconds of one picture (hollow: predicted, not measured)")
    dot = _dot(look)
    entries = [(dot(look.format(format, report.others), "o"), title_of(format)) for format in formats]
    look.legend(figure, entries)
    return figure


def elsewhere_alt(report: Report) -> str:
    fits = [row for row in report.elsewhere if row["task"] == "generate" and row["fits"]]
    if not fits:
        return ""
    best: dict[str, Any] = {}
    for row in sorted(fits, key=lambda row: -row["seconds"]):
        best[row["card"]] = row
    told = ", ".join(f"{card} {row['seconds']:.0f} s in {title_of(row['format'])}" for card, row in best.items())
    return f"Predictions of one picture's seconds, nothing measured; the quickest format of each card: {told}."


# Shared


def _dot(look: Look) -> Callable[..., Any]:
    from matplotlib.lines import Line2D

    def make(color: str, shape: str, hollow: bool = False) -> Any:
        face = look.paper if hollow else color
        return Line2D([], [], linestyle="", marker=shape, markersize=6.5, color=color, markerfacecolor=face)

    return make


def _dashes(color: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle="--", linewidth=1.2)


def _plain_ticks(axis: Any) -> None:
    """A logarithmic axis with 1, 2 and 5 of every decade, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _widen(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Room for labels about the points."""
    if not xs:
        return
    room = 0.12 * (max(xs) - min(xs) or max(xs) or 1)
    axes.set_xlim(max(0, min(xs) - room), max(xs) + 1.6 * room)
    if axes.get_yscale() == "log":
        axes.set_ylim(min(ys) / 1.35, max(ys) * 1.5)
    else:
        high = 0.12 * (max(ys) - min(ys) or 1)
        axes.set_ylim(min(ys) - high, max(ys) + high)


PLOTS = (
    *(
        Plot(
            f"time-memory-{task}", f"Time against memory: {words}",
            "Each variant and limit. Dashed: what could be reached at best with less memory, the time without a limit "
            "or that of copying at every step what is not on the card.",
            time_memory_alt(task), time_memory(task),
        )
        for task, words in (("generate", "drawing"), ("edit", "editing"), ("ask", "answering"))
    ),
    Plot("phases", "Where the seconds go", "A request's phases, medians of its runs.", phases_alt, phases),
    Plot(
        "fidelity", "Fidelity against size", "What is no format (step caches, adapters) stands at the source's size.",
        fidelity_alt, fidelity,
    ),
    Plot(
        "errors", "Where errors arise",
        "Of the velocity at each step, on the source's own way, so that they do not add up; and of the hidden states "
        "after each layer, at the first step. What is zero everywhere is not drawn.",
        errors_alt, errors,
    ),
    Plot(
        "predicted", "Predicted and measured", "The planner's predictions; what is outside the shaded band is named.",
        predicted_alt, predicted,
    ),
    Plot(
        "startup", "Start-up", "A command for one picture, with a cold and a warm page cache.", startup_alt, startup,
    ),
    Plot(
        "elsewhere", "Cards that are not here",
        "The planner's predictions from nominal rates, for the published model with 32 GB of RAM: none is measured.",
        elsewhere_alt, elsewhere,
    ),
)  # fmt: skip
