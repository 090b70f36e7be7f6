"""Several cards for one model: what each of them holds and does, by predicted seconds. Pure; no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import inf
from typing import NamedTuple

from ..errors import DoesNotFitError
from ..hardware.profile import HardwareProfile
from .calibration import MEASURED, Calibration
from .facts import ModelFacts
from .memory import STAGEABLE, Workload, kv_cache_bytes, velocity_bytes
from .plan import Plan, Prediction
from .solve import Need, Placed, make_plan, placed, placed_as
from .workload import Limits, Request

PAYS_FROM = 1.05
"""How many times faster several cards must be than one: seconds closer than that are not told apart."""


class PlanInputs(NamedTuple):
    """What a plan is made from; `others` are the cards beside the first."""

    facts: ModelFacts
    profile: HardwareProfile
    limits: Limits
    request: Request
    others: tuple[PlanInputs, ...] = ()

    @property
    def device(self) -> str:
        """The card in words, where there are several."""
        name = f" ({self.profile.device_name})" if self.profile.assumed and self.profile.device_name else ""
        return f"{self.limits.overrides.device}{name}"


def make_plans(inputs: PlanInputs, calibration: Calibration = MEASURED) -> Plan:
    """The fastest plan that fits: of one card, or of several where they are given and that pays.

    Raises:
        DoesNotFitError, SettingError: as of `make_plan`.
    """
    if not inputs.others:
        return make_plan(*inputs[:4], calibration)
    return _Cards(inputs, calibration).plan()


@dataclass
class Division:
    """A way to divide the work, predicted: seconds of a request of each task, and what each card in use does.

    `step` is the seconds of a guided step; `words` say who does what.
    """

    seconds: Sequence[float]
    step: float
    cards: Mapping[int, Placed]
    branches: dict[str, int] = field(default_factory=dict)
    words: str = ""

    @property
    def total(self) -> float:
        return sum(self.seconds)


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
            full = first.search.latency.branch(workload, workload.context_tokens, first.streaming)
            guided = workload.guided_steps * self.step(workload) + sum(map(self._sending_keys(workload), self._others))
            seconds["denoise"] = guided + (workload.steps - workload.guided_steps) * full
        return seconds

    def step(self, workload: Workload) -> float:
        """Seconds of a guided step: the slowest card's, and what the cards tell each other."""
        return max(self._evaluating(workload, card) for card in self.cards) + max(
            self._exchange(workload, card) for card in self._others
        )

    @property
    def _others(self) -> list[int]:
        return [card for card in self.cards if card]

    def _evaluating(self, workload: Workload, card: int) -> float:
        found = self.cards[card]
        tokens = (count for name, count in workload.branch_tokens.items() if name in self.branches[card])
        return sum(found.search.latency.branch(workload, count, found.streaming) for count in tokens)

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


def seconds_of_several(
    plan: Plan, inputs: PlanInputs, workload: Workload, calibration: Calibration = MEASURED
) -> dict[str, float]:
    """Seconds of each phase of a request under a plan for several cards that was made from `inputs`."""
    left = [*inputs.others]
    cards = {0: placed_as(plan, *inputs[:4], calibration)}
    branches: dict[int, list[str]] = {0: [n for n in workload.branch_tokens if n not in plan.branches]}
    for number, other in enumerate(plan.others, start=1):
        given = next(card for card in left if card.limits.overrides.device == other.device)
        left.remove(given)
        cards[number] = placed_as(other, *beside(given, plan.dtype)[:4], calibration)
        branches[number] = [name for name, card in plan.branches.items() if card == number]
    return Guided(cards, branches, calibration).request(workload)


class _Cards:
    """The cards of one plan, the first one first."""

    def __init__(self, inputs: PlanInputs, calibration: Calibration) -> None:
        self.calibration = calibration
        self.first = inputs._replace(others=())
        self.workloads = inputs.request.workloads(inputs.facts.config)
        alone = placed(*self.first[:4], calibration)
        self.alone = alone
        # Keys go from card to card as they are, and so do residual streams.
        dtype = alone.search.how.dtype if isinstance(alone, Placed) else inputs.limits.overrides.dtype
        self.given = [self.first, *inputs.others]
        self.cards = [self.first, *(beside(other, dtype) for other in inputs.others)]
        self._known: dict[tuple[int, frozenset[str], int], Placed | Need] = {}

    def plan(self) -> Plan:
        single = self._seconds_alone(self.first)
        best = min(self._guided(), key=lambda division: division.total, default=None)
        asked = self.first.limits.overrides.divide != "auto"
        if best is not None and (asked or best.total * PAYS_FROM <= single):
            return self._by_several(best)
        if asked:
            raise DoesNotFitError(f"divide {self.first.limits.overrides.divide}: {self._why_none()}")
        return self._by_one(best)

    def _seconds_alone(self, card: PlanInputs) -> float:
        """Of all tasks together, infinite where it does not fit."""
        found = self.alone if card is self.first else placed(*card[:4], self.calibration)
        if isinstance(found, Need):
            return inf
        return sum(sum(found.seconds(workload).values()) for workload in self.workloads)

    def _faster(self, seconds: float) -> str:
        """Which of the others had better been the first, in words; empty where none."""
        alone = {card.device: self._seconds_alone(card) for card in self.given[1:]}
        device = min(alone, key=alone.__getitem__)
        return f"; {device} is faster: name it first" if alone[device] * PAYS_FROM < seconds else ""

    # One card

    def _by_one(self, best: Division | None) -> Plan:
        """The first card's plan, and why the others do nothing."""
        made = make_plan(*self.first[:4], self.calibration)
        why = f"one card: {self._why_none()}"
        if best is not None:
            why = (
                f"one card is as fast: a guided step takes {self._alone_step:.2g} s on {self.first.device}, and "
                f"{best.step:.2g} s with {best.words}"
            )
        why += self._faster(self._seconds_alone(self.first))
        return replace(made, reasons={**made.reasons, "devices": why})

    def _why_none(self) -> str:
        """Why no branch can be handed out."""
        if all(workload.guided_branches < 2 for workload in self.workloads):
            return "several share the branches of guidance, which these tasks do not have"
        return "; ".join(self._short())

    def _short(self) -> Iterator[str]:
        """What the other cards lack."""
        for card in range(1, len(self.cards)):
            found = self._placed(card, frozenset({"text"}), 2)
            if isinstance(found, Need):
                yield f"{self.cards[card].device} {found.line}"

    @cached_property
    def _alone_step(self) -> float:
        """Seconds of a guided step on the first card alone, of the first task that has any."""
        if isinstance(self.alone, Need):
            return inf
        workload = next(workload for workload in self.workloads if workload.guided_branches > 1)
        denoise = self.alone.seconds(workload)["denoise"]
        single = self.alone.search.latency.branch(workload, workload.context_tokens, self.alone.streaming)
        return (denoise - (workload.steps - workload.guided_steps) * single) / workload.guided_steps

    # A branch of guidance a card

    def _guided(self) -> Iterator[Division]:
        """Every way to hand out the branches but the full context's, which the first card keeps."""
        names = [*max((w.branch_tokens for w in self.workloads), key=len)][1:]
        for owners in product(range(len(self.cards)), repeat=len(names)):
            if any(owners):
                division = self._divided(dict(zip(names, owners, strict=True)))
                if division is not None:
                    yield division

    def _divided(self, owners: Mapping[str, int]) -> Division | None:
        """A way to hand out branches; None where a card has no room for its part."""
        branches = {
            card: frozenset(n for n, owner in owners.items() if owner == card) for card in {0, *owners.values()}
        }
        branches[0] |= {"full"}
        cards: dict[int, Placed] = {}
        for card, names in branches.items():
            found = self._placed(card, names, len(branches))
            if isinstance(found, Need):
                return None
            cards[card] = found
        work = Guided(cards, branches, self.calibration)
        seconds = [sum(work.request(workload).values()) for workload in self.workloads]
        guided = next(workload for workload in self.workloads if workload.guided_branches > 1)
        words = "; ".join(
            f"{' and '.join(n for n in ('full', 'text', 'image') if n in names)} on {self.cards[card].device}"
            for card, names in sorted(branches.items())
        )
        elsewhere = {name: owner for name, owner in owners.items() if owner}
        return Division(seconds, work.step(guided), cards, elsewhere, words)

    def _placed(self, card: int, names: frozenset[str], users: int) -> Placed | Need:
        """Where the weights of a card live that evaluates these branches, one of so many cards."""
        key = card, names, users
        if key not in self._known:
            given = self.cards[card]
            own = [_of_card(workload, names, first=card == 0) for workload in self.workloads]
            self._known[key] = placed(
                given.facts,
                _sharing_ram(given.profile, users, self.calibration),
                _sharing_limit(given.limits, users),
                given.request,
                self.calibration,
                [workload for workload in own if workload is not None],
                batches=(False,),
            )
        return self._known[key]

    def _by_several(self, best: Division) -> Plan:
        """A plan a card; those that do nothing have none, and the reason says why."""
        numbers = {card: number for number, card in enumerate(sorted(best.cards))}
        made = {card: found.plan() for card, found in best.cards.items()}
        others = tuple(
            replace(made[card], left_out=STAGEABLE, context_store=None) for card in sorted(best.cards) if card
        )
        first = made[0]
        assert first.prediction is not None
        alone = "" if isinstance(self.alone, Need) else f", {self._alone_step:.2g} s on {self.first.device} alone"
        reasons = {
            **first.reasons,
            "guidance_batch": "the branches are on several cards",
            "devices": f"{best.words}: a guided step takes {best.step:.2g} s{alone}{self._faster(best.total)}",
        }
        for card in set(range(len(self.cards))) - best.cards.keys():
            reasons[self.cards[card].device] = self._unused(card)
        return replace(
            first,
            others=others,
            branches={name: numbers[card] for name, card in best.branches.items()},
            prediction=Prediction(first.prediction.peak_bytes, first.prediction.step_bytes, best.seconds[0]),
            reasons=reasons,
        )

    def _unused(self, card: int) -> str:
        found = self._placed(card, frozenset({"text"}), 2)
        if isinstance(found, Need):
            return f"not used: {found.line}"
        return "not used: the others are done sooner without it"


def beside(inputs: PlanInputs, dtype: str) -> PlanInputs:
    """A card beside the first: it holds the decoder alone, for the same arithmetic."""
    overrides = replace(inputs.limits.overrides, dtype=dtype)
    return inputs._replace(
        facts=replace(inputs.facts, left_out=frozenset(STAGEABLE)),
        limits=replace(inputs.limits, overrides=overrides, context_store=None),
    )


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
        vit_tokens=0,
        text_tokens=0,
        new_tokens=0,
        steps=workload.guided_steps,
        own_branches=len(own),
        prefilled=sum(workload.branch_tokens[name] for name in own),
    )


def _sharing_ram(profile: HardwareProfile, users: int, calibration: Calibration) -> HardwareProfile:
    """The machine as one of so many cards sees it: weights that wait, and page locks, have their share of the RAM."""
    kept = calibration.host_bytes if profile.device == "cuda" else 0
    available = profile.ram_available * calibration.usable_ram
    share = (max(0.0, available - kept) / users + kept) / calibration.usable_ram
    return replace(profile, ram_available=int(share), pin_limit=profile.pin_limit // users)


def _sharing_limit(limits: Limits, users: int) -> Limits:
    return limits if limits.max_ram is None else replace(limits, max_ram=limits.max_ram // users)
