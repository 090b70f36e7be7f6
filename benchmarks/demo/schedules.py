"""Which evaluations of a picture are computed, and how the others are predicted: what `search` tries, by family.

Importing this needs no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random

from lowmem_bagel.sampling.step_caches.velocity import EARLY, PATTERNS, Pattern

LINE, PARABOLA, CUBIC = 1, 2, 3
POLYNOMIALS = ("repeated", "a line", "a parabola", "a cubic")
OURS = tuple(PATTERNS.values())
"""Patterns that are drawn in any case."""


@dataclass(frozen=True)
class Schedule:
    """Which steps of a branch are computed, and how its velocity is predicted from those at the others.

    first: so many at the start are computed. intervals: from which step on one in how many is. runs: instead of both,
    lengths of runs of computed and of predicted steps in turn, stretched to a picture's steps. last: so is the last
    step. order: of the polynomial through the last computed ones, 0 for repeating. damped: of Hermite's polynomials in
    its place the contraction, 0 for none. over: what it is a polynomial of: t, or u, the time before the shift. rarer:
    how much more rarely guidance's branches are computed than the full one, (without the last text, texts alone): where
    that is not 1, their difference from it is predicted, by order `rarer_order`. ends: guidance stops at this t.
    stops: guidance by the text stops, scene by scene, once |c - ct| is less than so much of |c|.
    """

    first: int
    intervals: tuple[tuple[int, int], ...]
    runs: tuple[int, ...] = ()
    last: bool = False
    order: int = LINE
    damped: float = 0.0
    over: str = "u"
    rarer: tuple[int, int] = (1, 1)
    rarer_order: int = 0
    ends: float = 0.0
    stops: float = 0.0

    def steps(self, count: int) -> list[int]:
        """Of so many steps those that are computed."""
        found = self._in_runs(count) if self.runs else self._in_intervals(count)
        return sorted({*found, *([count - 1] if self.last else [])})

    def _in_intervals(self, count: int) -> list[int]:
        pattern, found = Pattern(self.first, self.intervals), [0]
        while (step := pattern.following(found[-1])) < count:
            found.append(step)
        return found

    def _in_runs(self, count: int) -> list[int]:
        ends = [round(end * count / sum(self.runs)) for end in itertools.accumulate(self.runs, initial=0)]
        return [step for run in range(0, len(self.runs), 2) for step in range(ends[run], ends[run + 1])]

    def rare_steps(self, count: int, rarer: int) -> list[int]:
        """Those of a branch that is computed so much more rarely."""
        steps, first = self.steps(count), max(self.first, 1)
        return steps if rarer == 1 else sorted({*steps[:first], *steps[first - 1 :: rarer]})

    def __str__(self) -> str:
        return "; ".join((self._computed(), f"{_line(self.order, self.damped)} in {self.over}", *self._more()))

    def _computed(self) -> str:
        if self.runs:
            return f"runs of {' '.join(map(str, self.runs))}"
        return f"{self.first} at first, {', then '.join(f'one in {n} from {start}' for start, n in self.intervals)}"

    def _more(self) -> Iterator[str]:
        if self.last:
            yield "the last"
        for branch, rarer in zip(("text", "image"), self.rarer, strict=True):
            if rarer > 1:
                yield f"{branch}'s difference one in {rarer}, {POLYNOMIALS[self.rarer_order]}"
        if self.ends:
            yield f"guided to {self.ends:g}"
        if self.stops:
            yield f"guided above {self.stops:g}"


@dataclass(frozen=True)
class Dual:
    """DBCache: the first layers, `front` of them, are computed at every step, and the last, `back` of them; what the
    layers between add is predicted where what the first ones add changed by less than `threshold` since all were
    computed.

    warm: so many steps at the start, and the last one, are computed. most: predicted steps in a row. order and damped:
    of the polynomial through what the middle added when it was last computed, as `Schedule` has it.
    """

    front: int
    back: int
    threshold: float
    warm: int
    most: int
    order: int = 0
    damped: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.front} first and {self.back} last layers, below {self.threshold:g}, {self.warm} at first, "
            f"at most {self.most} predicted; {_line(self.order, self.damped)}"
        )


def _line(order: int, damped: float) -> str:
    return f"Hermite's of {damped:g}, {POLYNOMIALS[order]}" if damped else POLYNOMIALS[order]


Plan = Schedule | Dual
EXACT = Schedule(1, ((0, 1),))
CONSTANT = tuple(((0, n),) for n in range(2, 11))
TURNS = tuple(((0, a), (at, b)) for a, b in itertools.permutations((2, 3, 4, 5, 6, 8), 2) for at in (8, 16, 24, 32))
USUAL = (
    *CONSTANT[:-2],
    EARLY.intervals,
    *(((0, a), (at, b)) for a, b, at in ((2, 4, 8), (3, 5, 16), (3, 6, 24), (4, 5, 16))),
)
"""Patterns that whatever is not a pattern is tried with."""
MASKS = (
    (8, 1, 3, 2, 3, 2, 2, 2, 1, 3, 1), (6, 1, 2, 3, 2, 3, 2, 3, 2, 3, 1), (6, 1, 1, 3, 1, 4, 1, 5, 1, 4, 1),
    (4, 2, 1, 5, 1, 6, 1, 7, 1),
)  # fmt: skip
"""cache-dit's masks of 28 steps, from slow to ultra."""


def _patterns(order: int, over: str) -> Iterator[Schedule]:
    for first, intervals in itertools.product((1, 2, 3, 5), (*CONSTANT, *TURNS)):
        yield Schedule(first, intervals, order=order, over=over)


def _few(**more: object) -> Iterator[Schedule]:
    for first, intervals in itertools.product((1, 2, 3), USUAL):
        yield Schedule(first, intervals, **more)  # type: ignore[arg-type]


def _masks() -> Iterator[Schedule]:
    pairs = ((n, *(k, n) * (48 // (n + k))) for n in (2, 3) for k in range(1, 10))
    starts = ((head, *(k, n) * ((48 - head) // (n + k))) for head in (4, 8) for n in (1, 2) for k in range(2, 8))
    for runs, order in itertools.product((*MASKS, *pairs, *starts), (0, LINE, PARABOLA)):
        yield Schedule(1, (), runs=runs, order=order)


def _duals() -> Iterator[Dual]:
    """From thresholds that hardly anything is below to one that nearly all is."""
    shapes = itertools.product((1, 2), (0, 1), (0.02, 0.03, 0.05, 0.08, 0.12, 0.2), ((2, 2), (2, 3), (4, 3), (4, 5)))
    for (front, back, threshold, (warm, most)), (order, damped) in itertools.product(
        shapes, ((0, 0.0), (LINE, 0.0), (PARABOLA, 0.0), (LINE, 0.5), (PARABOLA, 0.5))
    ):
        if order < warm:
            yield Dual(front, back, threshold, warm, most, order, damped)


def _rarer(order: int, *which: tuple[int, int]) -> Iterator[Schedule]:
    for rarer in which:
        yield from _few(rarer=rarer, rarer_order=order)


def _damped() -> Iterator[Schedule]:
    for order, damped in itertools.product((LINE, PARABOLA), (0.3, 0.5, 0.7)):
        yield from _few(order=order, damped=damped)


def _each(name: str, *values: float) -> Iterator[Schedule]:
    for value in values:
        yield from _few(**{name: value})


BOTH, TEXT, IMAGE = ((2, 2), (3, 3)), ((2, 1), (3, 1)), ((1, 2), (1, 3))
PLAIN = "a line in u"
FAMILIES: Mapping[str, Callable[[], Iterator[Plan]]] = {
    PLAIN: lambda: itertools.chain(
        (Schedule(p.first, p.intervals) for p in OURS), _patterns(LINE, "u")
    ),
    "a line in t": lambda: _patterns(LINE, "t"),
    "a parabola in u": lambda: _patterns(PARABOLA, "u"),
    "a parabola in t": lambda: _patterns(PARABOLA, "t"),
    "a cubic in u": lambda: _few(order=CUBIC),
    "the last velocity again": lambda: _few(order=0),
    "Hermite's polynomials": _damped,
    "the last step computed": lambda: _few(last=True),
    "masks: runs of computed steps": _masks,
    "guidance's difference repeated": lambda: _rarer(0, *BOTH),
    "guidance's difference on a line": lambda: _rarer(LINE, *BOTH),
    "the text's difference alone repeated": lambda: _rarer(0, *TEXT),
    "the text's difference alone on a line": lambda: _rarer(LINE, *TEXT),
    "the image's difference alone repeated": lambda: _rarer(0, *IMAGE),
    "the image's difference alone on a line": lambda: _rarer(LINE, *IMAGE),
    "guidance ended at a time": lambda: _each("ends", 0.5, 0.6, 0.7, 0.8),
    "guidance ended at a threshold": lambda: _each("stops", 0.015, 0.025, 0.04, 0.07, 0.12),
    "DBCache": _duals,
}  # fmt: skip
"""What is searched, by name: what an order, a place or a branch is other than in the first family."""
OF_EDITS = tuple(name for name in FAMILIES if "alone" in name)
"""Families that need a branch of guidance that drawings do not have."""


def families(editing: bool) -> Mapping[str, list[Plan]]:
    """Every schedule of a task once, by its family."""
    known: set[Plan] = {EXACT}
    found: dict[str, list[Plan]] = {}
    for name, make in FAMILIES.items():
        if editing or name not in OF_EDITS:
            found[name] = [plan for plan in dict.fromkeys(make()) if plan not in known]
            known |= set(found[name])
    return found


def ordered(editing: bool, seed: int) -> list[tuple[str, Plan]]:
    """All of them with their families, so that any beginning is an even sample: patterns that the package has, then one
    of each family in turn, in random order."""
    rng, queues = Random(seed), families(editing)
    ours = [(PLAIN, plan) for plan in queues[PLAIN][: len(OURS)]]
    queues = {**queues, PLAIN: queues[PLAIN][len(OURS) :]}
    shuffled = {name: rng.sample(plans, len(plans)) for name, plans in queues.items()}
    rounds = itertools.zip_longest(*([(name, plan) for plan in plans] for name, plans in shuffled.items()))
    return [*ours, *(one for turn in rounds for one in turn if one is not None)]
