"""The plot of errors by step and by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .looks import Look, plain
from .reading import Fidelity, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)), (0, (1, 4)))
"""Of what is no format, and has no color of its own."""


def _apart(report: Report) -> list[Fidelity]:
    """Variants that differ somewhere."""
    return [variant for variant in report.fidelity if any(variant.velocity) or any(variant.layers)]


def errors(report: Report, look: Look) -> Figure:
    from matplotlib.lines import Line2D

    figure, panels = look.figure(4.0, 2)
    entries = []
    without_color = 0
    for variant in _apart(report):
        is_format = variant.kind == "format"
        color = look.format(variant.name, report.others) if is_format else look.faint
        style: Any = "-" if is_format else STYLES[without_color % len(STYLES)]
        without_color += not is_format
        for axes, values in zip(panels, (variant.velocity, variant.layers), strict=True):
            steps = [(place, value) for place, value in enumerate(values, 1) if value > 0]
            if steps:
                axes.plot(*zip(*steps, strict=True), color=color, linestyle=style, linewidth=1.4, marker=".")
        entries.append((Line2D([], [], color=color, linestyle=style), plain(variant.title)))
    for axes, words in zip(panels, ("step", "layer"), strict=True):
        if axes.lines:
            axes.set_yscale("log")
        look.name(axes, words, "relative L2", f"By {words}")
    look.legend(figure, entries)
    return figure


def errors_alt(report: Report) -> str:
    told = [
        f"{variant.title} at most {max(variant.velocity):.2g} by step" for variant in _apart(report) if variant.velocity
    ]
    return f"Errors of the velocity by step and of hidden states by layer: {', '.join(told)}." if told else ""
