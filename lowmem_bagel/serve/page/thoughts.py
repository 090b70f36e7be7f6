"""An answer and the reasoning before it, which `think` writes as one text."""

from __future__ import annotations

from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"


class Parts(NamedTuple):
    reasoning: str
    answer: str


def parts_of(text: str) -> Parts:
    """The two, also while the text is still being written."""
    before, opened, rest = text.partition(OPEN)
    if not opened or before.strip():
        return Parts("", text.strip())
    reasoning, _, answer = rest.partition(CLOSE)
    return Parts(reasoning.strip(), answer.strip())
