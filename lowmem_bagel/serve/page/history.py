"""What a session has made: kept with the browser page, bounded, the newest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from ..service import Output

KEPT = 40
"""Entries; the oldest go first."""
SIDE = 192
"""Pixels of a thumbnail's longer side."""
CAPTION = 80
"""Characters."""
BUBBLE = ((16, 40), (176, 132))


@dataclass(frozen=True)
class Entry:
    """One result, with all that is needed to ask for it again.

    Attributes:
        tab: where it was made.
        texts: what was written, in order; None stands where a picture was.
        pictures: where those lie, in order: files that the browser uploaded, or that were drawn before. Their folder
            forgets them after a day.
        output: what was made.
        settings: every setting used.
        answer: the answer or the plan.
        thumbnail: path of a small picture of it.
    """

    tab: str
    texts: tuple[str | None, ...]
    pictures: tuple[str, ...]
    output: Output
    settings: Mapping[str, Any]
    answer: str
    thumbnail: str

    @property
    def prompt(self) -> str:
        return " … ".join(text for text in self.texts if text)

    @property
    def caption(self) -> str:
        line = " ".join(self.prompt.split())
        return line if len(line) <= CAPTION else f"{line[:CAPTION]}…"


History = tuple[Entry, ...]


def with_entry(history: History, entry: Entry) -> History:
    return (entry, *history)[:KEPT]


def thumbnails(history: Sequence[Entry]) -> list[tuple[str, str]]:
    """Picture and caption of each."""
    return [(entry.thumbnail, entry.caption) for entry in history]


def thumbnail(image: Image.Image | None) -> Image.Image:
    """A small copy; for an answer without a picture, a speech bubble."""
    from PIL import Image, ImageDraw

    if image is not None:
        small = image.copy()
        small.thumbnail((SIDE, SIDE))
        return small
    drawn = Image.new("RGB", (SIDE, SIDE), "#e8edf7")
    pen = ImageDraw.Draw(drawn)
    pen.polygon([(48, 124), (48, 164), (92, 124)], fill="#5b74b4")
    pen.rounded_rectangle(BUBBLE, radius=22, fill="#5b74b4")
    for x in (64, 96, 128):
        pen.ellipse((x - 8, 78, x + 8, 94), fill="white")
    return drawn
