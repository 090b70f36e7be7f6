"""Branches of guidance handed out to several cards, which evaluate them at the same time. Pure; no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import inf

from .calibration import Calibration
from .cards import Division, PlanInputs, spoken
from .memory import STAGEABLE, Workload, kv_cache_bytes, velocity_bytes
from .plan import Launcher, Plan
from .solve import Need, Placed, placed


@dataclass(frozen=True)
class Guided:
    """Branches of guidance that cards evaluate at the same time: what a request takes. The first card's number is 0."""

    cards: Mapping[int, Placed]
    branches: Mapping[int, Collection[str]]
    calibration: Calibration

    def request(self, workload: Workload) -> dict[str, float]:
        """Seconds of each phase; sending the keys of contexts is part of denoising."""
        first = self.cards[0]
        seconds = first.seconds(workload)
        if workload.guided_branches > 1:
            full = _branch(first, workload, workload.context_tokens)
            guided = workload.guided_steps * self.step(workload) + sum(map(self._sending_keys(workload), self._others))
            guided += sum(self._capturing(workload, card) for card in self.cards)
            seconds["denoise"] = workload.drawings * (guided + (workload.steps - workload.guided_steps) * full)
        return seconds

    def step(self, workload: Workload) -> float:
        """Seconds of a guided step: the slowest card's, or those of the thread that launches for all of them; and what
        the cards tell each other."""
        launching = sum(self._launching(workload, card) for card in self.cards)
        evaluating = max(self._evaluating(workload, card) for card in self.cards)
        return max(launching, evaluating) + max(self._exchange(workload, card) for card in self._others)

    @property
    def _others(self) -> list[int]:
        return [card for card in self.cards if card]

    def _evaluating(self, workload: Workload, card: int) -> float:
        found = self.cards[card]
        tokens = (count for name, count in workload.branch_tokens.items() if name in self.branches[card])
        return sum(_branch(found, workload, count) for count in tokens)

    def _launching(self, workload: Workload, card: int) -> float:
        """What the thread of the request takes to launch a card's evaluations; see `_launched`."""
        found = self.cards[card]
        if workload.picture_tokens <= found.best.graph_tokens or (card and found.best.residency.streamed):
            return 0.0
        evaluations = sum(name in self.branches[card] for name in workload.branch_tokens)
        return evaluations * found.search.latency.launching_among(len(self.cards))

    def _capturing(self, workload: Workload, card: int) -> float:
        """What the thread of the request takes to capture a card's evaluations."""
        found = self.cards[card]
        own = sum(name in self.branches[card] for name in workload.branch_tokens)
        return found.search.latency.capturing(replace(workload, own_branches=own), False, found.best.graph_tokens)

    def _exchange(self, workload: Workload, card: int) -> float:
        """A latent there and velocities back, through the host's memory."""
        there = self.cards[card].search
        nbytes = (1 + len(self.branches[card])) * velocity_bytes(there.facts.config, workload)
        return 2 * nbytes / there.machine.copy.get("pinned", inf) + self.calibration.exchange_seconds

    def _sending_keys(self, workload: Workload) -> Callable[[int], float]:
        def seconds(card: int) -> float:
            there = self.cards[card].search
            tokens = sum(count for name, count in workload.branch_tokens.items() if name in self.branches[card])
            nbytes = kv_cache_bytes(there.facts.config, there.how, tokens)
            return 2 * nbytes / there.machine.copy.get("pinned", inf)

        return seconds


class Branches:
    """All ways to hand out the branches but the full context's, which the first card keeps.

    Args:
        cards: the first, and those that hold the decoder alone.
        alone: how the first would do everything.
    """

    def __init__(
        self, cards: Sequence[PlanInputs], workloads: Sequence[Workload], alone: Placed | Need, calibration: Calibration
    ) -> None:
        self.cards, self.workloads, self.calibration = cards, workloads, calibration
        self._guided = next((workload for workload in workloads if workload.guided_branches > 1), None)
        self._alone = "" if self._guided is None else _alone_step(self._guided, alone, cards[0].device)
        self._known: dict[tuple[int, frozenset[str], int], Placed | Need] = {}

    def divisions(self) -> Iterator[Division]:
        names = [*max((w.branch_tokens for w in self.workloads), key=len)][1:]
        for owners in product(range(len(self.cards)), repeat=len(names)):
            if any(owners):
                division = self._division(dict(zip(names, owners, strict=True)))
                if division is not None:
                    yield division

    def why_none(self) -> str:
        """What keeps branches from being handed out, where nothing else does."""
        if self._guided is None:
            return "these tasks have no branches of guidance to share"
        return "; ".join(f"{self.cards[card].device} {line}" for card, line in self.too_small().items())

    def too_small(self) -> dict[int, str]:
        """Cards that have no room for a branch, and what they lack."""
        found = {card: self._placed(card, frozenset({"text"}), 2) for card in range(1, len(self.cards))}
        return {card: need.line for card, need in found.items() if isinstance(need, Need)}

    def _division(self, owners: Mapping[str, int]) -> Division | None:
        """None where a card has no room for its part."""
        used = {0, *owners.values()}
        branches = {card: frozenset(name for name in owners if owners[name] == card) for card in used}
        branches[0] |= {"full"}
        cards: dict[int, Placed] = {}
        for card, names in sorted(branches.items()):
            found = self._placed(card, names, len(branches))
            if isinstance(found, Need):
                return None
            cards[card] = found
        assert self._guided is not None
        work = Guided(cards, branches, self.calibration)
        words = "; ".join(
            f"{' and '.join(n for n in ('full', 'text', 'image') if n in branches[card])} on {self.cards[card].device}"
            for card in cards
        )
        return Division(
            [sum(work.request(workload).values()) for workload in self.workloads],
            cards,
            words,
            f"a guided step takes {spoken(work.step(self._guided))}",
            self._alone,
            partial(_plan, cards, {name: owner for name, owner in owners.items() if owner}),
        )

    def _placed(self, card: int, names: frozenset[str], users: int) -> Placed | Need:
        """Where the weights of a card live that evaluates these branches, one of so many cards."""
        key = card, names, users
        if self.cards[card].broken:
            return Need(inf, self.cards[card].broken)
        if key not in self._known:
            given = self.cards[card]
            own = [_of_card(workload, names, first=card == 0) for workload in self.workloads]
            self._known[key] = placed(
                given.facts,
                *given.sharing(users, self.calibration),
                given.request,
                self.calibration,
                [workload for workload in own if workload is not None],
                batches=(False,),
                cards=users,
            )
        return self._known[key]


def _plan(cards: Mapping[int, Placed], branches: Mapping[str, int]) -> Plan:
    numbers = {card: number for number, card in enumerate(cards)}
    first, *others = (found.plan() for found in cards.values())
    return replace(
        first,
        others=tuple(_launched(replace(other, left_out=STAGEABLE)) for other in others),
        branches={name: numbers[card] for name, card in branches.items()},
        reasons=first.reasons | {"guidance_batch": "the branches are on several cards"},
    )


def _launched(plan: Plan) -> Plan:
    """With who launches what the card evaluates. Two threads of one process take turns with Python's lock at every
    launch, so the request's does it all, one card after the other, unless a card would keep it waiting."""
    launcher: Launcher = "request"
    why = "by the request's thread: they return at once"
    if plan.device == "cpu":
        launcher, why = "thread", "by a thread of its own: a processor computes what it is told at once"
    elif plan.residency.streamed:
        launcher, why = "thread", "by a thread of its own: weights that stream are waited for"
    return replace(plan, launcher=launcher, reasons=plan.reasons | {"launches": why})


def _branch(found: Placed, workload: Workload, tokens: int) -> float:
    """Seconds of one evaluation of a branch on a card that sees so many tokens beside the picture."""
    return found.search.latency.branch(workload, tokens, found.streaming, found.best.graph_tokens)


def _alone_step(workload: Workload, alone: Placed | Need, device: str) -> str:
    """What a guided step takes on one card, in words; empty where it does not fit there."""
    if isinstance(alone, Need):
        return ""
    single = _branch(alone, workload, workload.context_tokens)
    guided = alone.seconds(workload)["denoise"] / workload.drawings - (workload.steps - workload.guided_steps) * single
    return f"{spoken(guided / workload.guided_steps)} on {device} alone"


def _of_card(workload: Workload, names: frozenset[str], first: bool) -> Workload | None:
    """What is left of a request for a card that evaluates these branches; None for nothing."""
    own = [name for name in workload.branch_tokens if name in names]
    if first:
        return replace(workload, own_branches=len(own)) if workload.guided_branches > 1 else workload
    if not own or workload.guided_branches < 2:
        return None
    return replace(
        workload,
        input_grids=[],
        vit_each=(),
        vit_tokens=0,
        text_tokens=0,
        new_tokens=0,
        kept_tokens=0,
        steps=workload.guided_steps,
        own_branches=len(own),
        prefilled=sum(workload.branch_tokens[name] for name in own),
    )
