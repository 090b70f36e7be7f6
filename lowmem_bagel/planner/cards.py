"""Cards that a plan may use, and ways to divide the work among them. Pure; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..hardware.profile import HardwareProfile
from .calibration import Calibration
from .facts import ModelFacts
from .memory import STAGEABLE
from .plan import Plan
from .solve import Placed
from .workload import Limits, Request

TRIED = "a computation on the card: "
"""How the line of a profile begins that says why a card was not taken for one."""


class PlanInputs(NamedTuple):
    """What a plan is made from; `others` are the cards beside the first. `variant` is the folder that such a card holds
    in place of the first one's, and `same` how it is known to be the same model."""

    facts: ModelFacts
    profile: HardwareProfile
    limits: Limits
    request: Request
    others: tuple[PlanInputs, ...] = ()
    variant: str = ""
    same: str = ""

    @property
    def device(self) -> str:
        """The card in words, where there are several."""
        name = f" ({self.profile.device_name})" if self.profile.assumed and self.profile.device_name else ""
        return f"{self.limits.overrides.device}{name}"

    @property
    def broken(self) -> str:
        """What is wrong with a card that is there and computes nothing right, in words; empty where nothing is."""
        asked_for = self.limits.overrides.device.startswith("cuda")
        if self.profile.device == "cuda" or not asked_for or not self.profile.device_name:
            return ""
        found = next((line for line in self.profile.problems if line.startswith(TRIED)), "")
        return f"computes nothing right{f' ({found.removeprefix(TRIED)})' if found else ''}"

    def sharing(self, users: int, calibration: Calibration) -> tuple[HardwareProfile, Limits]:
        """The machine and the limits as one of so many cards sees them: what waits in RAM, and page locks, have their
        share."""
        kept = calibration.host_bytes if self.profile.device == "cuda" else 0
        available = self.profile.ram_available * calibration.usable_ram
        share = (max(0.0, available - kept) / users + kept) / calibration.usable_ram
        limit = None if self.limits.max_ram is None else self.limits.max_ram // users
        profile = replace(self.profile, ram_available=int(share), pin_limit=self.profile.pin_limit // users)
        return profile, replace(self.limits, max_ram=limit)


@dataclass
class Division:
    """A way to divide the work, predicted.

    seconds: of a request of each task. cards: those in use, by number. words: who does what. speed: that in seconds, in
    words, and alone: what the first card takes, empty where it cannot. plan: of the first card, with the others in it.
    """

    seconds: Sequence[float]
    cards: Mapping[int, Placed]
    words: str
    speed: str
    alone: str
    plan: Callable[[], Plan]

    @property
    def total(self) -> float:
        return sum(self.seconds)


def beside(inputs: PlanInputs, dtype: str) -> PlanInputs:
    """A card beside the first: it holds the decoder alone, for the same arithmetic."""
    overrides = replace(inputs.limits.overrides, dtype=dtype)
    return inputs._replace(
        facts=replace(inputs.facts, left_out=frozenset(STAGEABLE)),
        limits=replace(inputs.limits, overrides=overrides, context_store=None),
    )


def spoken(seconds: float) -> str:
    """Seconds in two figures, or whole ones."""
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"
