"""Layers divided over several cards, which take turns: how many for each, by predicted seconds. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, pairwise
from math import inf

from .calibration import Calibration
from .cards import Division, PlanInputs, spoken
from .facts import ModelFacts
from .memory import ITEMSIZE, STAGEABLE, Workload
from .plan import Plan, Unit
from .solve import Need, Placed, placed, placed_as


class Layers:
    """All ways to divide layers over cards, which have them in their order.

    Args:
        cards: the first, and those that hold the decoder alone.
        alone: how the first would do everything.
        all_of_them: whether each card must have a layer, though it should not pay.
    """

    def __init__(
        self,
        cards: Sequence[PlanInputs],
        workloads: Sequence[Workload],
        alone: Placed | Need,
        calibration: Calibration,
        all_of_them: bool = False,
    ) -> None:
        self.fewest = [1, *[int(all_of_them)] * (len(cards) - 1)]
        self.cards, self.workloads, self.calibration = cards, workloads, calibration
        self._alone = ""
        if isinstance(alone, Placed):
            self._alone = f"{spoken(sum(alone.seconds(workloads[0]).values()))} on {cards[0].device} alone"
        self.count = cards[0].facts.config.decoder.num_layers
        # As many layers take as long on each of some cards that differ in their number alone.
        unnumbered = [_unnumbered(card) for card in cards]
        self._alike = [unnumbered.index(card) for card in unnumbered]
        self._shares = [card.sharing(len(cards), calibration) for card in cards]
        self._parts: dict[tuple[int, range], ModelFacts] = {}
        self._known: dict[tuple[int, range, bool], Placed | Need] = {}
        self._added: dict[tuple[int, int, bool], tuple[float, float]] = {}

    def divisions(self) -> Iterator[Division]:
        """The fastest for guidance in one batch, and branch by branch."""
        for batch in (True, False):
            counts = self._fastest(batch)
            if counts is not None and sum(count > 0 for count in counts) > 1:
                division = self._division(counts, batch)
                if division is not None:
                    yield division

    def _fastest(self, batch: bool) -> list[int] | None:
        """Layers of each card that take the least seconds together; None where they do not fit."""
        counted = ((card, count) for card in range(len(self.cards)) for count in range(1, self.count + 1))
        again = {self._adding(card, count, batch)[1] for card, count in counted}
        best, counts = inf, None
        for most in sorted(again - {inf}):
            if most >= best:
                break
            seconds, found = self._within(most, batch)
            if seconds + most < best:
                best, counts = seconds + most, found
        return counts

    def _within(self, most: float, batch: bool) -> tuple[float, list[int] | None]:
        """The same of divisions by which no card takes more than so long for all branches after the first."""
        best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for card in range(len(self.cards)):
            longer: dict[int, tuple[float, list[int]]] = {}
            each = ((count, *self._adding(card, count, batch)) for count in range(self.fewest[card], self.count + 1))
            allowed = [(count, added) for count, added, again in each if again <= most]
            for done, (seconds, counts) in best.items():
                for count, added in allowed:
                    total = seconds + added
                    if done + count <= self.count and total < longer.get(done + count, (inf,))[0]:
                        longer[done + count] = total, [*counts, count]
            best = longer
        return best.get(self.count, (inf, None))

    def _adding(self, card: int, count: int, batch: bool) -> tuple[float, float]:
        """What a card adds to a request of each task together, and what the branches after the first take there; layers
        are taken to be all alike."""
        if not count:
            return 0.0, 0.0
        card = self._alike[card]
        key = card, count, batch
        if key not in self._added:
            found = self._placed(card, range(count), batch)
            if isinstance(found, Need):
                self._added[key] = inf, inf
            else:
                each = [_seconds(workload, found, self.calibration, card > 0) for workload in self.workloads]
                again = sum(_again(workload, found) for workload in self.workloads)
                self._added[key] = sum(sum(seconds.values()) for seconds in each), again
        return self._added[key]

    def _placed(self, card: int, layers: range, batch: bool) -> Placed | Need:
        given = self.cards[card]
        key = card, layers, batch
        if given.broken:
            return Need(inf, given.broken)
        if key not in self._known:
            profile, limits = self._shares[card]
            limits = replace(limits, context_store=None)
            facts = self._parts.get((card, layers)) or given.facts.of_layers(layers)
            self._parts[card, layers] = facts
            own = facts, profile, limits, given.request
            self._known[key] = placed(*own, self.calibration, self.workloads, batches=(batch,))
        return self._known[key]

    def _division(self, counts: Sequence[int], batch: bool) -> Division | None:
        """The counts as they are, each card with its own layers."""
        bounds = [0, *accumulate(counts)]
        cards: dict[int, Placed] = {}
        ranges: dict[int, range] = {}
        for card, (start, stop) in enumerate(pairwise(bounds)):
            if start == stop:
                continue
            found = self._placed(card, range(start, stop), batch)
            if isinstance(found, Need):
                return None
            cards[card], ranges[card] = found, range(start, stop)
        seconds = [sum(_together(workload, cards, self.calibration).values()) for workload in self.workloads]
        words = "; ".join(
            f"{len(layers)} of {self.count} layers on {self.cards[card].device}" for card, layers in ranges.items()
        )
        plan = partial(self._plan, cards, ranges)
        speed = f"{self.workloads[0].task} takes {spoken(seconds[0])}"
        return Division(seconds, cards, words, speed, self._alone, plan)

    def _plan(self, cards: dict[int, Placed], ranges: dict[int, range]) -> Plan:
        made = [
            replace(_shifted(found.plan(), ranges[card].start), layers=(ranges[card].start, ranges[card].stop))
            for card, found in cards.items()
        ]
        first, *others = made
        wished = self.cards[0].limits.context_store is not None
        reasons = {"context store": "off: layers are on several cards"} if wished else {}
        return replace(
            first,
            others=tuple(replace(other, left_out=STAGEABLE) for other in others),
            reasons=first.reasons | reasons,
        )


def seconds_of_layers(
    plans: Sequence[Plan], cards: Sequence[PlanInputs], workload: Workload, calibration: Calibration
) -> dict[str, float]:
    """Seconds of each phase of a request under plans that divide the layers, one for each of the cards."""
    found: dict[int, Placed] = {}
    for number, (plan, card) in enumerate(zip(plans, cards, strict=True)):
        assert plan.layers is not None
        layers = range(*plan.layers)
        own = card.facts.of_layers(layers)
        found[number] = placed_as(_shifted(plan, -layers.start), own, *card[1:4], calibration)
    return _together(workload, found, calibration)


def _together(workload: Workload, cards: Mapping[int, Placed], calibration: Calibration) -> dict[str, float]:
    """Seconds of each phase. Cards take turns, but that while one has a branch of guidance, those before have the next
    ones: a step takes as long as one branch through all of them, and the others through the slowest."""
    seconds: dict[str, float] = {}
    for card, found in cards.items():
        for phase, taken in _seconds(workload, found, calibration, card > 0).items():
            seconds[phase] = seconds.get(phase, 0.0) + taken
    seconds["denoise"] += max(_again(workload, found) for found in cards.values())
    return seconds


def _again(workload: Workload, found: Placed) -> float:
    """Seconds that the branches after the first take on a card, in all guided steps; none where they are one batch."""
    if found.best.batch or workload.guided_branches < 2:
        return 0.0
    one = found.search.latency.branch(workload, workload.context_tokens, found.streaming)
    return workload.drawings * workload.guided_steps * (workload.guided_branches - 1) * one


def _seconds(workload: Workload, found: Placed, calibration: Calibration, crossing: bool) -> dict[str, float]:
    """Of each phase, of a card's layers with one branch of guidance, or all in a batch; and of getting there and back,
    through the host's memory."""
    alone = workload.guided_branches > 1 and not found.best.batch
    seconds = dict(found.seconds(replace(workload, own_branches=1) if alone else workload))
    if not crossing:
        return seconds
    how, width = found.search.how, found.search.facts.config.decoder.hidden_size
    rate = found.search.machine.copy.get("pinned", inf)

    def hops(tokens: int, passes: int) -> float:
        # There, and at the end back: what two cards lose to each other in a guided step.
        return passes * (calibration.exchange_seconds + 4 * tokens * width * ITEMSIZE[how.residual_dtype] / rate)

    seconds["prefill"] += hops(workload.context_tokens, 1)
    seconds["text"] += hops(1, workload.new_tokens)
    evaluations = workload.drawings * (workload.steps + workload.guided_steps * (workload.guided_branches - 1))
    seconds["denoise"] += hops(workload.picture_tokens, evaluations if workload.picture_tokens else 0)
    return seconds


def _unnumbered(card: PlanInputs) -> PlanInputs:
    kind = card.limits.overrides.device.partition(":")[0]
    limits = replace(card.limits, overrides=replace(card.limits.overrides, device=kind))
    return card._replace(limits=limits, others=())


def _shifted(plan: Plan, by: int) -> Plan:
    """A plan with its units so many layers later."""

    def moved(units: tuple[Unit, ...]) -> tuple[Unit, ...]:
        return tuple((layer + by, expert) for layer, expert in units)

    own = plan.residency
    return replace(
        plan, residency=replace(own, streamed=moved(own.streamed), pageable=moved(own.pageable), disk=moved(own.disk))
    )
