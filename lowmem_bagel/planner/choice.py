"""Which format and which step cache for a machine: every combination planned, and ranked by one rule. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product

from ..checkpoint.config import BagelConfig
from ..checkpoint.tensors import EXPERTS, tensor_table
from ..errors import DoesNotFitError
from ..formats.registry import formats
from ..formats.spec import FormatSpec
from ..hardware.profile import HardwareProfile
from ..sampling.step_caches.registry import step_caches
from ..settings import Task
from ..units import format_bytes
from .facts import ModelFacts, known_shape
from .fidelity import Loss, losses
from .plan import Plan
from .solve import SMALLER_SIDES, Limits, Need, Overrides, Request, host_bytes, plan_or_need

A_LOSS_BRINGS = 1.5
"""How many times faster a choice with one more loss within bounds must be."""
BEYOND_BOUNDS_BRINGS = 4.0
"""The same of one with a loss that is beyond them, or that was not measured."""
AS_FAST = 1.05
"""Seconds that differ by no more than this factor are predicted no better than that."""
BEYOND = 9
"""The level of a choice with a loss beyond bounds; others are at the number of their losses."""
CONVERTED_SOURCE = "bf16"
"""The format that a checkpoint in bfloat16 has already."""


@dataclass(frozen=True)
class Offer:
    """A model to choose. `folder` is that of a checkpoint or a variant, "" for the published checkpoint; `converted`:
    it must first be made from that."""

    facts: ModelFacts
    folder: str = ""
    converted: bool = False


@dataclass(frozen=True)
class Choice:
    """One format with one step cache. `plan` is None where it does not fit, and `why` then says what would do.

    `ram` counts the process with its weights; on a processor it is all there is, and `peak` 0. `stored` is the size of
    the folder on disk. All in bytes.
    """

    offer: Offer
    step_cache: str
    plan: Plan | None = None
    why: str = ""
    ram: int = 0
    stored: int = 0
    losses: tuple[Loss, ...] = ()

    @property
    def facts(self) -> ModelFacts:
        return self.offer.facts

    @property
    def title(self) -> str:
        cache = "" if self.step_cache == "none" else f" with {self.step_cache}"
        return f"{self.facts.spec.title}{cache}"

    @property
    def seconds(self) -> float:
        """Of one request, predicted; infinite where it does not fit."""
        predicted = self.plan.prediction if self.plan is not None else None
        return math.inf if predicted is None or predicted.seconds is None else predicted.seconds

    @property
    def peak(self) -> int:
        """Of the card's memory, predicted."""
        if self.plan is None or self.plan.device == "cpu" or self.plan.prediction is None:
            return 0
        return self.plan.prediction.peak_bytes

    def burden(self) -> tuple[tuple[float, float], int]:
        """Of choices that are as fast, the one with less is better: points lost, then errors, then the memory."""
        points, error = (sum(getattr(loss, name) or 0.0 for loss in self.losses) for name in ("points", "error"))
        return (points, error), self.peak + self.ram

    @property
    def level(self) -> int:
        return len(self.losses) if all(loss.bounded for loss in self.losses) else BEYOND

    @property
    def fidelity(self) -> str:
        return "; ".join(loss.words for loss in self.losses) or "lossless"


@dataclass(frozen=True)
class Wanted:
    """What a choice is made for."""

    task: Task = "generate"
    height: int = 1024
    width: int = 1024
    limits: Limits = field(default_factory=Limits)
    lossless: bool = False

    def request(self, step_cache: str) -> Request:
        return Request(tasks=(self.task,), height=self.height, width=self.width, step_cache=step_cache)


def choose(offers: Sequence[Offer], profile: HardwareProfile, wanted: Wanted) -> list[Choice]:
    """Every choice, the one to take first, then what would be taken without it, and at last those that do not fit.

    The rule: it begins with the fastest that loses nothing. A choice with more losses, each measured and within bounds
    (`fidelity.LARGEST_ERROR`, `MOST_POINTS`), takes its place where it is `A_LOSS_BRINGS` times faster; the fewer
    losses are asked first. One with a loss beyond the bounds or not measured must be `BEYOND_BOUNDS_BRINGS` times
    faster. Where nothing better fits, it is taken too. Of choices that are as fast (`AS_FAST`) the one that
    loses least counts as the fastest, then the one that needs least memory.

    Raises:
        DoesNotFitError: nothing fits; the line says what would.
    """
    found = list(_choices(offers, profile, wanted))
    if wanted.lossless:
        found = [choice for choice in found if not choice.losses]
    fitting = [choice for choice in found if choice.plan is not None]
    if not fitting:
        raise DoesNotFitError(_what_would_fit(offers, profile, wanted))
    ranked = []
    while fitting:
        best = preferred(fitting)
        ranked.append(best)
        fitting.remove(best)
    return ranked + [choice for choice in found if choice.plan is None]


def preferred(choices: Iterable[Choice]) -> Choice:
    """The one to take of some that fit."""
    by_level: dict[int, list[Choice]] = {}
    for choice in choices:
        by_level.setdefault(choice.level, []).append(choice)
    (_, first), *others = sorted(by_level.items())
    best = _fastest(first)
    for level, more in others:
        faster = _fastest(more)
        if faster.seconds * (BEYOND_BOUNDS_BRINGS if level == BEYOND else A_LOSS_BRINGS) <= best.seconds:
            best = faster
    return best


def _fastest(choices: Sequence[Choice]) -> Choice:
    least = min(choice.seconds for choice in choices)
    return min((choice for choice in choices if choice.seconds <= least * AS_FAST), key=Choice.burden)


def compared(choice: Choice, best: Choice) -> str:
    """In words why a choice comes after the best."""
    if choice.plan is None:
        return choice.why
    if choice is best:
        return "recommended"
    factor = choice.seconds / best.seconds
    if factor > AS_FAST:
        return f"{factor:.1f} times slower"
    if choice.level == BEYOND:
        return "a loss beyond bounds, or not measured"
    if factor * AS_FAST < 1:
        return f"{1 / factor:.1f} times faster: a loss must bring {A_LOSS_BRINGS:g}"
    return "as fast, and loses more" if choice.burden()[0] > best.burden()[0] else "as fast, and needs more memory"


def offers(facts: ModelFacts, converters: Iterable[str], profile: HardwareProfile, folder: str = "") -> list[Offer]:
    """A checkpoint, and what can be converted from it; of a variant itself alone.

    On a card without bfloat16 the fp16 variant is the checkpoint in the form in which it is multiplied; elsewhere it
    brings nothing.
    """
    if facts.format != "source":
        return [Offer(facts, folder)]
    half = profile.device == "cuda" and not profile.native_bf16
    known = set(converters) - {CONVERTED_SOURCE} - (set() if half else {"fp16"})
    made = [ModelFacts.of_config(facts.config, name, facts.name) for name in formats() if name in known]
    return [*([] if half else [Offer(facts, folder)]), *(Offer(other, folder, converted=True) for other in made)]


def stored_bytes(facts: ModelFacts, task: Task | None = None) -> int:
    """About the size of a folder in this format; of one that only answers where the task is to ask.

    The autoencoder is float32; what the format does not encode is of two bytes a value.
    """
    return _stored_bytes(facts.config, facts.spec, task)


@lru_cache(maxsize=64)
def _stored_bytes(config: BagelConfig, form: FormatSpec, task: Task | None) -> int:
    experts = ("und",) if task == "ask" else EXPERTS
    total = 0
    for spec in tensor_table(config).values():
        if (spec.part in ("latent", "vae") and task == "ask") or spec.expert not in (None, *experts):
            continue
        shape = known_shape(spec)
        encoded = form.encoded and form.encodes(spec)
        total += form.nbytes(shape) if encoded else math.prod(shape) * (4 if spec.part == "vae" else 2)
    return total


def _choices(offers: Sequence[Offer], profile: HardwareProfile, wanted: Wanted) -> Iterator[Choice]:
    caches = step_caches() if wanted.task != "ask" else ("none",)
    sizes = [stored_bytes(offer.facts) for offer in offers]
    for (offer, stored), cache in product(zip(offers, sizes, strict=True), caches):
        facts, request = offer.facts, wanted.request(cache)
        choice = Choice(offer, cache, stored=stored)
        plan = plan_or_need(facts, profile, wanted.limits, request)
        if isinstance(plan, Need):
            yield replace(
                choice, why=f"does not fit: {plan.line}", losses=losses(facts.spec, "", "", cache, wanted.task)
            )
            continue
        ram = host_bytes(plan, facts, profile, wanted.limits, request)
        lost = losses(facts.spec, plan.dtype, plan.attention, cache, wanted.task)
        yield replace(choice, plan=plan, ram=ram, losses=lost)


def _what_would_fit(offers: Sequence[Offer], profile: HardwareProfile, wanted: Wanted) -> str:
    """One line: that nothing fits, and which changes would do."""

    def best(other: HardwareProfile, asked: Wanted) -> Choice | None:
        tried = (choice for choice in _choices(offers, other, asked) if choice.plan is not None)
        fitting = [choice for choice in tried if not (wanted.lossless and choice.losses)]
        return preferred(fitting) if fitting else None

    remedies = []
    if wanted.lossless and any(choice.plan is not None for choice in _choices(offers, profile, wanted)):
        remedies.append("leave --lossless out")
    for side in SMALLER_SIDES:
        if wanted.task != "ask" and side < max(wanted.height, wanted.width):
            height, width = min(side, wanted.height), min(side, wanted.width)
            smaller = best(profile, replace(wanted, height=height, width=width))
            if smaller is not None:
                remedies.append(f"draw pictures of {side}x{side} in {smaller.title} (--size {side})")
                break
    if profile.device == "cuda":
        free = replace(wanted.limits, max_vram=None, overrides=Overrides(device="cpu"))
        slow = best(replace(profile, device="cpu", native_bf16=False), replace(wanted, limits=free))
        if slow is not None:
            minutes = f"{slow.seconds / 60:.0f} minutes"
            remedies.append(f"use the processor (--device cpu), which takes about {minutes} in {slow.title}")
    where = profile.device_name or ("this card" if profile.device == "cuda" else "this processor")
    have = profile.vram_total if profile.device == "cuda" else profile.ram_total
    memory = f"{format_bytes(have)}{' of RAM' if profile.device != 'cuda' else ''}"
    what = "nothing lossless" if wanted.lossless else "nothing"
    remedy = "; or ".join(remedies) or "use a machine with more memory"
    return f"{what} fits on {where} ({memory}) to {wanted.task} at {wanted.width}x{wanted.height}: {remedy}"
