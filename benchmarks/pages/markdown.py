"""Pieces of Markdown that the pages made from records are put together from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

WIDTH = 120
"""Columns of a page's paragraphs."""


def section(title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"## {title}", *paragraphs])


def prose(*paragraphs: str) -> str:
    return "\n\n".join(_filled(paragraph, WIDTH) for paragraph in paragraphs)


def table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(names)
    return "\n".join([_line(head), "|---" * len(head) + "|", *(_line(row) for row in rows)])


def command(text: str) -> str:
    """An indented block, its lines joined by backslashes."""
    first, *rest = _filled(text, WIDTH - 10).splitlines()
    return " \\\n".join([f"    {first}", *(f"        {line}" for line in rest)])


def replaced(page: str, begin: str, end: str, text: str) -> str:
    """The page with what is between its two markers replaced."""
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{text}\n{end}{after}"


def digits(value: float) -> str:
    """Three digits."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False)
