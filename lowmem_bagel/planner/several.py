"""One card or several: who does what, by predicted seconds, with reasons. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf

from ..errors import DeviceError, DoesNotFitError
from .branches import Branches, Guided
from .calibration import MEASURED, Calibration
from .cards import Division, PlanInputs, beside
from .compute import compute_configs
from .layers import Layers, seconds_of_layers
from .memory import Workload
from .plan import Plan
from .solve import Need, Placed, make_plan, placed, placed_as

PAYS_FROM = 1.05
"""How many times faster several cards must be than one: seconds closer than that are not told apart."""


def make_plans(inputs: PlanInputs, calibration: Calibration = MEASURED) -> Plan:
    """The fastest plan that fits: of one card, or of several where they are given and that pays.

    Raises:
        DoesNotFitError, SettingError: as of `make_plan`.
    """
    if not inputs.others:
        return make_plan(*inputs[:4], calibration)
    return _Cards(inputs, calibration).plan()


def seconds_of_several(
    plan: Plan, inputs: PlanInputs, workload: Workload, calibration: Calibration = MEASURED
) -> dict[str, float]:
    """Seconds of each phase of a request under a plan for several cards that was made from `inputs`."""
    left = [*inputs.others]
    given = [inputs]
    for other in plan.others:
        given.append(next(card for card in left if card.limits.overrides.device == other.device))
        left.remove(given[-1])
    plans = [plan, *plan.others]
    cards = [inputs, *(beside(card, plan.dtype) for card in given[1:])]
    if plan.divided:
        return seconds_of_layers(plans, cards, workload, calibration)
    held = [placed_as(own, *card[:4], calibration) for own, card in zip(plans, cards, strict=True)]
    found = dict(enumerate(held))
    names = [*workload.branch_tokens]
    branches = {number: [name for name in names if plan.branches.get(name, 0) == number] for number in found}
    return Guided(found, branches, calibration).request(workload)


class _Cards:
    """The cards of one plan, the first one first."""

    def __init__(self, inputs: PlanInputs, calibration: Calibration) -> None:
        self.calibration = calibration
        self.first = inputs._replace(others=())
        self.others = inputs.others
        self.workloads = inputs.request.workloads(inputs.facts.config)
        if self.first.broken:
            raise DeviceError(f"{self.first.device} {self.first.broken}; name another card first")
        self.alone = placed(*self.first[:4], calibration)
        how, _ = next(compute_configs(inputs.facts, inputs.profile, inputs.limits.overrides))
        # Keys and residual streams go from card to card as they are.
        dtype = self.alone.search.how.dtype if isinstance(self.alone, Placed) else how.dtype
        self.cards = [self.first, *(beside(other, dtype) for other in inputs.others)]
        self.branches = Branches(self.cards, self.workloads, self.alone, calibration)

    def plan(self) -> Plan:
        asked = self.first.limits.overrides.divide
        best = min(self._divisions(asked), key=lambda division: division.total, default=None)
        if best is not None and (asked != "auto" or best.total * PAYS_FROM <= self._seconds_alone(self.first)):
            return self._by_several(best)
        if asked != "auto":
            why = (
                self.branches.why_none()
                if asked == "guidance"
                else "these cards have no room for the layers, one each at least"
            )
            raise DoesNotFitError(f"divide {asked}: {why}")
        return self._by_one(best)

    def _divisions(self, asked: str) -> Iterator[Division]:
        handed_out = False
        if asked != "layers":
            for division in self.branches.divisions():
                handed_out = True
                yield division
        if asked == "layers" or (asked == "auto" and self._layers_may_pay(handed_out)):
            given = self.cards, self.workloads, self.alone, self.calibration
            yield from Layers(*given, all_of_them=asked == "layers").divisions()

    def _layers_may_pay(self, handed_out: bool) -> bool:
        """Cards that share layers do less at the same time than those that share branches: it may pay where branches
        cannot be handed out, where the first card does not hold all layers, or where it is the slower one."""
        if not handed_out or isinstance(self.alone, Need) or self.alone.best.residency.streamed:
            return True
        return any(self._seconds_alone(card) < self._seconds_alone(self.first) for card in self.others)

    def _seconds_alone(self, card: PlanInputs) -> float:
        """Of all tasks together, infinite where it does not fit."""
        if card.broken:
            return inf
        found = self.alone if card is self.first else placed(*card[:4], self.calibration)
        if isinstance(found, Need):
            return inf
        return sum(sum(found.seconds(workload).values()) for workload in self.workloads)

    def _faster(self, seconds: float) -> str:
        """Which of the others had better been the first, in words; empty where none."""
        alone = {card.device: self._seconds_alone(card) for card in self.others}
        device = min(alone, key=alone.__getitem__)
        return f"; {device} is faster: name it first" if alone[device] * PAYS_FROM < seconds else ""

    def _by_one(self, best: Division | None) -> Plan:
        """The first card's plan, and why the others do nothing."""
        made = make_plan(*self.first[:4], self.calibration)
        why = [self.branches.why_none()]
        if best is not None:
            why += [f"{best.speed} with {best.words}, and {best.alone}"]
        said = "; ".join(part for part in why if part) + self._faster(self._seconds_alone(self.first))
        return replace(made, reasons={**made.reasons, "devices": f"one card: {said}"})

    def _by_several(self, best: Division) -> Plan:
        """A plan a card; those that do nothing have none, and the reason says why."""
        made = best.plan()
        made = replace(made, others=tuple(self._held(made.others, best)))
        assert made.prediction is not None
        alone = f", {best.alone}" if best.alone else ""
        reasons = {"devices": f"{best.words}: {best.speed}{alone}{self._faster(best.total)}"}
        for card in set(range(len(self.cards))) - best.cards.keys():
            why = self.branches.too_small().get(card, "the others are done sooner without it")
            reasons[self.cards[card].device] = f"not used: {why}"
        reasons |= self._variants(made, best)
        reasons["assumptions"] = "; ".join([*self._assumptions(made), *filter(None, [made.reasons.get("assumptions")])])
        prediction = replace(made.prediction, seconds=best.seconds[0])
        return replace(made, prediction=prediction, reasons=made.reasons | reasons)

    def _held(self, others: Sequence[Plan], best: Division) -> Iterator[Plan]:
        """Their plans with the folders that they are for."""
        for number, plan in zip(sorted(best.cards)[1:], others, strict=True):
            card = self.cards[number]
            if card.variant:
                plan = replace(plan, variant=card.variant, reasons=plan.reasons | {"variant": card.same})
            yield plan

    def _variants(self, made: Plan, best: Division) -> dict[str, str]:
        """What becomes of results where cards hold the model in formats of their own."""
        own = [self.cards[number] for number in sorted(best.cards)[1:] if self.cards[number].variant]
        each = [f"{card.device} holds {card.facts.format}, of {card.facts.name}" for card in own]
        if not each:
            return {}
        what = "layers" if made.divided else "branches"
        exact = all(card.facts.lossless for card in (self.first, *own))
        result = (
            "both are lossless: results are those of one card"
            if exact
            else f"results are not those of one card: its {what} are computed with the weights that it has"
        )
        return {"variants": f"{'; '.join(each)} ({self.first.device} {self.first.facts.format}); {result}"}

    def _assumptions(self, made: Plan) -> Iterator[str]:
        """What is not measured of cards together."""
        yield f"cards lose {self.calibration.exchange_seconds * 1e3:g} ms to each other at every exchange"
        if sum(bool(card.residency.streamed) for card in (made, *made.others)) > 1:
            yield "weights stream to several cards at once as fast as to one"
