"""Pages that show records: written by hand, but for what stands between `<!-- name -->` and `<!-- end of name -->`.

What stands there is made by a function of the records alone: figures in a paragraph, a table, or the commands that
measure again.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..words import digits as digits

WIDTH = 120
"""Columns of a page's paragraphs."""
STAMP = "Record"
"""The text in a PNG that says which records it was drawn from."""
Records = Mapping[str, Any]
"""As `record.read_records` gives them."""
Column = Callable[[Any], str]


@dataclass(frozen=True)
class Drawing:
    """PNGs of a page. `place`: their folder, from the checkout's root. `stamp`: of the records that are drawn, which
    every PNG carries. `make`: PNGs by file name, of records and the folder that they are in."""

    place: str
    stamp: Callable[[Records], str]
    make: Callable[[Records, Path], Mapping[str, bytes]]


@dataclass(frozen=True)
class Page:
    """`path`: from the checkout's root. `parts`: what is between which markers. `drawing`: of what is drawn for it."""

    path: str
    parts: Mapping[str, Callable[[Records], str]]
    drawing: Drawing | None = None

    def text(self, records: Records, now: str) -> str:
        """What the page is to be, `now` being what it is.

        Raises:
            ValueError: a marker does not stand there once.
        """
        for name, make in self.parts.items():
            before, rest = now.split(f"<!-- {name} -->")
            after = rest.split(f"<!-- end of {name} -->")[1]
            now = f"{before}<!-- {name} -->\n{make(records)}\n<!-- end of {name} -->{after}"
        return now


def prose(*paragraphs: str) -> str:
    return "\n\n".join(_filled(paragraph, WIDTH) for paragraph in paragraphs)


def table(columns: Mapping[str, Column], rows: Iterable[Any]) -> str:
    """A line a row; a column is its head, and what makes a row's cell. Spaces around a head make two of them differ."""
    lines = [[head.strip() for head in columns], *([make(row) for make in columns.values()] for row in rows)]
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * len(columns) + "|", *body])


def again(records: Records, before: Mapping[str, str]) -> str:
    """The commands that make the records anew; `before`: of records that do not say theirs yet."""
    made_by = {name: records[name].get("command", f"lowmem-bagel bench {words}") for name, words in before.items()}
    commands = [re.sub(r"--out \S+", f"--out benchmarks/results/{name}.json", words) for name, words in made_by.items()]
    return "\n".join(map(_command, [*commands, "lowmem-bagel bench pages"]))


def _command(text: str) -> str:
    """An indented block, its lines joined by backslashes."""
    first, *rest = _filled(text, WIDTH - 10).splitlines()
    return " \\\n".join([f"    {first}", *(f"        {line}" for line in rest)])


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False)
