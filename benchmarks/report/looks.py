"""How the report looks: colors of formats and phases, light and dark, and figures with labels that do not overlap.

The colors are Okabe and Ito's, which people with any color vision tell apart, darkened or lightened until they stand
out from the background. A format has the same one everywhere; shapes and words say the rest.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem_bagel.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
PALETTE = 128
"""Colors of a PNG."""
# format or phase: on a light background, on a dark one
FORMAT_COLORS: Mapping[str, tuple[str, str]] = {
    "source": ("#4d4d4d", "#d0d0d0"),
    "bf16": ("#4d4d4d", "#d0d0d0"),
    "fp16": ("#a8407f", "#e79ac6"),
    "dfloat11": ("#0072b2", "#56b4e9"),
    "int8": ("#c44e00", "#ff8f4d"),
    "nf4": ("#007a5a", "#2ec79d"),
    "gguf-q8_0": ("#5c4500", "#fff0a8"),
    "gguf-q6_k": ("#7d5f00", "#f5dc6a"),
    "gguf-q5_k": ("#a37b00", "#e6c02e"),
    "gguf-q4_k": ("#b98c00", "#bf9a00"),
}
OTHERS = (("#5b4bb5", "#a99cff"), ("#1f7a8c", "#7fd6e6"), ("#8c2d19", "#f08a75"))
"""Of formats that other packages bring, in the order of their names."""
PHASES = (
    ("#0072b2", "#56b4e9"), ("#c98500", "#f0c04a"), ("#007a5a", "#2ec79d"), ("#a8407f", "#e79ac6"),
    ("#c44e00", "#ff8f4d"), ("#5b4bb5", "#a99cff"), ("#767676", "#b0b0b0"), ("#8c2d19", "#f08a75"),
)  # fmt: skip
PLACES = ((6, 0), (-6, 0), (0, 7), (0, -7), (6, 8), (-6, 8), (6, -8), (-6, -8))
"""Where a label may stand beside its point, in points; farther ones have a line to it."""
FARTHER = (1.0, 2.4, 3.8, 5.5, 7.5)


@dataclass(frozen=True)
class Look:
    """dark: for a dark page. narrow: for a phone's width."""

    dark: bool = False
    narrow: bool = False

    @property
    def ink(self) -> str:
        return "#e8e8e8" if self.dark else "#1f1f1f"

    @property
    def faint(self) -> str:
        return "#9a9a9a" if self.dark else "#6b6b6b"

    @property
    def grid(self) -> str:
        return "#3a3d42" if self.dark else "#e0e0e0"

    @property
    def paper(self) -> str:
        return "#17191c" if self.dark else "#ffffff"

    def format(self, name: str, others: Sequence[str] = ()) -> str:
        """A format's color; `others`: names of those without one of their own."""
        pair = FORMAT_COLORS.get(name) or OTHERS[(sorted(others).index(name) if name in others else 0) % len(OTHERS)]
        return pair[self.dark]

    def phase(self, number: int) -> str:
        return PHASES[number % len(PHASES)][self.dark]

    def figure(self, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
        """A figure of so many inches and panels side by side; below each other at a phone's width."""
        width, rows = (4.2, columns) if self.narrow else (9.0, 1)
        figure = _new_figure(width, height * rows, self.paper)
        found = figure.subplots(rows, 1 if self.narrow else columns, squeeze=False)
        axes = [each for row in found for each in row]
        for each in axes:
            self._dress(each)
        return figure, axes

    def panels(self, rows: int, columns: int) -> tuple[Figure, Any]:
        """A figure of small square panels."""
        figure = _new_figure(1.75 * columns, 1.95 * rows, self.paper)
        return figure, figure.subplots(rows, columns, squeeze=False)

    @property
    def text_size(self) -> float:
        return 8.0 if self.narrow else 9.0

    def _dress(self, axes: Axes) -> None:
        axes.set_facecolor(self.paper)
        axes.tick_params(colors=self.ink, labelsize=self.text_size, which="both", color=self.faint)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(self.faint)
        axes.grid(color=self.grid, linewidth=0.7)
        axes.set_axisbelow(True)

    def name(self, axes: Axes, x: str = "", y: str = "", title: str = "") -> None:
        """The axes' labels and title."""
        axes.set_xlabel(x, color=self.ink, fontsize=self.text_size)
        axes.set_ylabel(y, color=self.ink, fontsize=self.text_size)
        if title:
            axes.set_title(title, color=self.ink, fontsize=self.text_size + 1, loc="left", pad=10)

    def _columns(self, names: Sequence[str]) -> int:
        return min(len(names), max(1, (46 if self.narrow else 110) // (max(map(len, names)) + 6)))

    def legend_lines(self, names: Sequence[str]) -> int:
        """That the legend of them takes."""
        return math.ceil(len(names) / self._columns(names))

    def legend(self, figure: Figure, entries: Iterable[tuple[Any, str]]) -> None:
        """Below everything, in as many columns as fit; lines are read from left to right."""
        waiting = list(entries)
        columns = self._columns([name for _, name in waiting])
        handles, names = zip(*(each for n in range(columns) for each in waiting[n::columns]), strict=True)
        figure.legend(
            handles, list(map(plain, names)), loc="outside lower left", ncols=columns, frameon=False,
            fontsize=self.text_size, labelcolor=self.ink, handletextpad=0.5, columnspacing=1.4,
        )  # fmt: skip


def png(figure: Figure, about: Mapping[str, str], colors: int = PALETTE) -> bytes:
    """The figure as a small PNG, of as many colors as a plot has; `about`: what is written into it besides."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    small, said = io.BytesIO(), PngInfo()
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()  # `savefig` would do it twice, and encode what is decoded here again
    for name, text in about.items():
        said.add_text(name, text)
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    image.quantize(colors, dither=Image.Dither.NONE).save(small, "PNG", optimize=True, pnginfo=said)
    return small.getvalue()


def plain(text: str) -> str:
    """Text of whatever origin as matplotlib shows it, which takes what is between dollars for a formula."""
    return text.replace("$", r"\$")


def label_points(axes: Axes, look: Look, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write a label beside each (x, y, text, color) where nothing stands yet.

    Call it last: what is drawn later is not seen.
    """
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine(None)  # or the layout would move what the labels stand beside
    scale = DPI / 72
    inside = axes.get_window_extent()
    spots = [axes.transData.transform((x, y)) for x, y, *_ in points]
    taken = [Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale) for x, y in spots]
    taken += [text.get_window_extent() for text in axes.texts]
    taken += [Bbox.from_bounds(x - scale, y - scale, 2 * scale, 2 * scale) for x, y in _along_lines(axes, 5 * scale)]
    for (x, y, said, color), spot in zip(points, spots, strict=True):
        if not said:
            continue
        text = plain(said)
        shown = axes.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=look.text_size - 1, color=color,
            annotation_clip=False,
        )  # fmt: skip
        size = shown.get_window_extent()
        dx, dy, box = _free_place(spot, size.width, size.height, taken, inside, scale)
        shown.remove()
        taken.append(box)
        far = max(abs(dx), abs(dy)) > 12
        axes.annotate(
            text, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=look.text_size - 1, color=color,
            ha=_side(dx, "left", "right"), va=_side(dy, "bottom", "top"), annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": look.faint, "linewidth": 0.6, "shrinkB": 3} if far else None,
        )  # fmt: skip


def _along_lines(axes: Axes, step: float) -> list[Any]:
    """Places on the lines that are drawn, in pixels, `step` apart."""
    import numpy as np

    found: list[Any] = []
    for line in axes.lines:
        corners = axes.transData.transform(line.get_xydata())
        if len(corners) > 1 and line.get_transform() == axes.transData and line.get_linestyle() != "None":
            for start, end in itertools.pairwise(corners):
                count = max(2, int(np.hypot(*(end - start)) / step) + 1)
                found += [start + (end - start) * share for share in np.linspace(0, 1, count)]
    return found


def _side(offset: float, after: str, before: str) -> str:
    return after if offset > 0 else before if offset < 0 else "center"


def _free_place(
    spot: Any, width: float, height: float, taken: Sequence[Any], inside: Any, scale: float
) -> tuple[float, float, Any]:
    """The nearest offset in points at which a label hits nothing, and its box; where there is none, the least bad."""
    from matplotlib.transforms import Bbox

    best: tuple[float, float, float, Any] | None = None
    for times in FARTHER:
        for dx, dy in PLACES:
            x = spot[0] + dx * times * scale - (width if dx < 0 else 0 if dx > 0 else width / 2)
            y = spot[1] + dy * times * scale - (height if dy < 0 else 0 if dy > 0 else height / 2)
            box = Bbox.from_bounds(x, y, width, height)
            hits = sum(_overlap(box, other) for other in taken) + _outside(box, inside)
            if best is None or hits < best[0]:
                best = (hits, dx * times, dy * times, box)
            if not hits:
                return dx * times, dy * times, box
    assert best is not None
    return best[1:]


def _overlap(one: Any, other: Any) -> float:
    wide = min(one.x1, other.x1) - max(one.x0, other.x0)
    high = min(one.y1, other.y1) - max(one.y0, other.y0)
    return float(wide * high) if wide > 0 and high > 0 else 0.0


def _outside(box: Any, inside: Any) -> float:
    beyond = max(0, inside.x0 - box.x0) + max(0, box.x1 - inside.x1)
    beyond_y = max(0, inside.y0 - box.y0) + max(0, box.y1 - inside.y1)
    return float(beyond * box.height + beyond_y * box.width)


def _new_figure(width: float, height: float, paper: str) -> Figure:
    """A figure that is drawn in memory, without a window and without matplotlib's own state.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(f'plots need matplotlib ({error}): pip install "lowmem-bagel[benchmarks]"') from error
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=paper, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
