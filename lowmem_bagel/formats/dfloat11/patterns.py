r"""Patterns of module names, as `pattern_dict` of published DFloat11 folders has them, matched in bounded time.

They are regular expressions, and come with a folder: Python's matcher may try for years what a few characters ask of
it. So these are read as what such folders hold (characters, `\.`, `\d`, `\w`, `.`, sets, groups, `|`, `?`, `*`, `+`,
`^` and `$` at the ends) and matched by following all possibilities at once. No torch.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache, lru_cache, reduce
from operator import or_

MAX_PATTERNS = 32
MAX_LENGTH = 300
"""Characters of a pattern, and of a name."""
MAX_DEPTH = 3
"""Of groups inside groups: a repeated group of repeated groups multiplies the work."""
MAX_REPETITIONS = 4
"""`*` and `+` in a pattern; such folders have one, for the number of a layer."""
CLASSES = {"d": frozenset(string.digits), "w": frozenset(string.ascii_letters + string.digits + "_")}
SPECIAL = frozenset("\\[](){}|?*+.^$")

Step = Callable[[str, int], int]
"""(name, places in it, a bit for each) -> the places after what the step matches, from any of these."""


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a whole name matches the pattern, as a function of the name.

    Raises:
        ValueError: the pattern is none of this kind; it says why in a few words.
    """
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH} characters")
    step = _Reader(pattern.removeprefix("^")).whole()
    return lambda name: len(name) <= MAX_LENGTH and bool(step(name, 1) >> len(name))


class _Reader:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        anchored = pattern.endswith("$") and not pattern.endswith("\\$")
        self._rest = list(pattern.removesuffix("$") if anchored else pattern)[::-1]
        self._repetitions = 0
        self._where = cache(_places)

    def whole(self) -> Step:
        step = self._choice(0)
        if self._rest:
            raise ValueError(f"{self._rest[-1]} without its other half")
        return step

    def _choice(self, depth: int) -> Step:
        choices = [self._sequence(depth)]
        while self._takes("|"):
            choices.append(self._sequence(depth))
        return choices[0] if len(choices) == 1 else _either(choices)

    def _sequence(self, depth: int) -> Step:
        steps = []
        while self._rest and self._rest[-1] not in "|)":
            steps.append(self._repeated(self._single(depth)))
        return _after_each_other(steps)

    def _repeated(self, step: Step) -> Step:
        if self._takes("?"):
            step = _maybe(step)
        elif self._takes("*"):
            step = _maybe(self._often(step))
        elif self._takes("+"):
            step = self._often(step)
        else:
            return step
        if self._rest and self._rest[-1] in "?*+":
            raise ValueError("a repetition of a repetition")
        return step

    def _often(self, inner: Step) -> Step:
        self._repetitions += 1
        if self._repetitions > MAX_REPETITIONS:
            raise ValueError(f"more than {MAX_REPETITIONS} repetitions")
        return _often(inner)

    def _single(self, depth: int) -> Step:
        char = self._rest.pop()
        if char == "(":
            return self._group(depth + 1)
        if char == "[":
            return self._one_of(self._set())
        if char == ".":
            return _any
        if char == "\\":
            return self._one_of(self._escaped())
        if char in SPECIAL:
            raise ValueError(f"{char} is not understood here")
        return self._one_of(frozenset(char))

    def _one_of(self, chars: frozenset[str]) -> Step:
        where = self._where
        return lambda name, places: (places & where(name, chars)) << 1

    def _group(self, depth: int) -> Step:
        if depth > MAX_DEPTH:
            raise ValueError("groups nested too deep")
        if self._takes("?") and not self._takes(":"):
            raise ValueError("a group of a kind that is not understood")
        step = self._choice(depth)
        if not self._takes(")"):
            raise ValueError("( without its other half")
        return step

    def _set(self) -> frozenset[str]:
        found: set[str] = set()
        while not self._takes("]"):
            first = self._member()
            if len(self._rest) > 1 and self._rest[-1] == "-" and self._rest[-2] != "]":
                self._rest.pop()
                last = self._member()
                if len(first) != 1 or len(last) != 1:
                    raise ValueError("a range between what are no characters")
                found.update(map(chr, range(ord(*first), ord(*last) + 1)))
            else:
                found |= first
        return frozenset(found)

    def _member(self) -> frozenset[str]:
        if not self._rest:
            raise ValueError("[ without its other half")
        char = self._rest.pop()
        if char in "^[" or not char.isascii():
            raise ValueError(f"{char} is not understood in a set")
        return self._escaped() if char == "\\" else frozenset(char)

    def _escaped(self) -> frozenset[str]:
        char = self._rest.pop() if self._rest else ""
        if char in CLASSES:
            return CLASSES[char]
        if not char or char.isalnum():
            raise ValueError(f"\\{char} is not understood")
        return frozenset(char)

    def _takes(self, char: str) -> bool:
        if not self._rest or self._rest[-1] != char:
            return False
        self._rest.pop()
        return True


def _places(name: str, chars: frozenset[str]) -> int:
    by_char = _by_char(name)
    if len(chars) == 1:
        (only,) = chars
        return by_char.get(only, 0)
    return sum(places for char, places in by_char.items() if char in chars)


@lru_cache(maxsize=2048)  # every character of a pattern asks, of every pattern
def _by_char(name: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for place, char in enumerate(name):
        found[char] = found.get(char, 0) | 1 << place
    return found


def _any(name: str, places: int) -> int:
    return (places & (1 << len(name)) - 1) << 1


def _after_each_other(steps: list[Step]) -> Step:
    def step(name: str, places: int) -> int:
        for each in steps:
            if not places:
                break
            places = each(name, places)
        return places

    return step


def _either(choices: list[Step]) -> Step:
    def step(name: str, places: int) -> int:
        return reduce(or_, (choice(name, places) for choice in choices))

    return step


def _maybe(inner: Step) -> Step:
    return lambda name, places: places | inner(name, places)


def _often(inner: Step) -> Step:
    def step(name: str, places: int) -> int:
        reached = 0
        while places:
            places = inner(name, places) & ~reached
            reached |= places
        return reached

    return step
