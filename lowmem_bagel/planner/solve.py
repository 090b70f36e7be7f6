"""From a model, a machine, limits and a request to a plan: the fastest placement that fits. Pure; no torch.

Every combination of the few choices (guidance in one batch or not, which parts wait in RAM, how many units stream
through how many slots) is predicted, and of those that fit the fastest is taken. More memory only adds
combinations, so it never makes a plan slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from ..errors import DoesNotFitError
from ..formats.registry import formats
from ..hardware.profile import HardwareProfile
from ..units import format_bytes
from .calibration import MEASURED, Calibration
from .compute import Overrides, compute_configs
from .context_room import context_room
from .facts import ModelFacts
from .latency import Streaming
from .memory import ComputeConfig, Workload
from .plan import Plan, Prediction
from .reasons import explain
from .search import Candidate, PhaseBytes, Search
from .workload import Limits, Request, most_frames

__all__ = [
    "Limits", "Need", "Overrides", "PhaseBytes", "Request", "breakdown", "host_bytes", "make_plan", "plan_or_need",
]  # fmt: skip

SMALLER_SIDES = (768, 512, 256)


def make_plan(
    facts: ModelFacts,
    profile: HardwareProfile,
    limits: Limits,
    request: Request,
    calibration: Calibration = MEASURED,
) -> Plan:
    """The fastest plan that fits.

    Raises:
        DoesNotFitError: no placement fits; the message says what would.
        SettingError: a setting made by hand that this machine or this model cannot have.
    """
    found = plan_or_need(facts, profile, limits, request, calibration)
    if isinstance(found, Plan):
        return found
    raise DoesNotFitError(_what_would_fit(facts, profile, limits, request, calibration, found))


@dataclass(frozen=True)
class Need:
    """Why nothing fits: the least peak found in bytes, infinite where RAM holds too little, and a line of it."""

    lowest: float
    line: str


def plan_or_need(
    facts: ModelFacts,
    profile: HardwareProfile,
    limits: Limits,
    request: Request,
    calibration: Calibration = MEASURED,
) -> Plan | Need:
    """The fastest plan that fits, or what it would need; quicker than looking for what would fit instead.

    Raises:
        SettingError: a setting made by hand that this machine or this model cannot have.
    """
    found = placed(facts, profile, limits, request, calibration)
    return found.plan() if isinstance(found, Placed) else found


class Placed(NamedTuple):
    """The fastest placement of a search, and the reasons for the arithmetic that it searched with."""

    search: Search
    best: Candidate
    reasons: dict[str, str]

    def plan(self) -> Plan:
        return _plan(*self)

    @property
    def streaming(self) -> Streaming:
        return self.search.streaming(self.best.residency)

    def seconds(self, workload: Workload) -> dict[str, float]:
        """Of each phase."""
        staged = frozenset(self.best.residency.staged)
        return self.search.latency.request(workload, self.streaming, staged, self.best.batch, self.best.graph_tokens)


def placed(
    facts: ModelFacts, profile: HardwareProfile, limits: Limits, request: Request, calibration: Calibration = MEASURED,
    workloads: Sequence[Workload] | None = None, batches: Sequence[bool] = (True, False), cards: int = 1,
) -> Placed | Need:  # fmt: skip
    """The fastest placement that fits, or what it would need; the last three are as of `Search`.

    Raises:
        SettingError: a setting made by hand that this machine or this model cannot have.
    """
    lowest, search = inf, None
    for how, reasons in compute_configs(facts, profile, limits.overrides):
        search = Search(facts, profile, limits, request, how, calibration, workloads, batches, cards)
        best = search.best()
        if best is not None:
            return Placed(search, best, reasons)
        lowest = min(lowest, search.lowest_peak)
    assert search is not None
    return Need(lowest, _need(search, lowest))


def placed_as(
    plan: Plan, facts: ModelFacts, profile: HardwareProfile, limits: Limits, request: Request,
    calibration: Calibration = MEASURED,
) -> Placed:  # fmt: skip
    """The placement of a plan that was made from these arguments."""
    how = _same_arithmetic(plan, facts, profile, limits)
    best = Candidate(0.0, 0, 0, plan.guidance_batch, plan.residency, plan.graph_tokens)
    return Placed(Search(facts, profile, limits, request, how, calibration), best, {})


def _need(search: Search, lowest: float) -> str:
    if lowest == inf:
        return f"{format_bytes(max(search.ram, 0))} of RAM may be used for weights, which is too little"
    have = search.promise if search.on_card else search.ram
    memory = "GPU memory" if search.on_card else "RAM"
    return f"needs {format_bytes(lowest + search.reserve)} of {memory}, and {format_bytes(have)} may be used"


def breakdown(
    plan: Plan, facts: ModelFacts, profile: HardwareProfile, limits: Limits, request: Request,
    calibration: Calibration = MEASURED,
) -> list[PhaseBytes]:  # fmt: skip
    """What is on the device in every phase under a plan that was made from these arguments."""
    how = _same_arithmetic(plan, facts, profile, limits)
    return list(Search(facts, profile, limits, request, how, calibration).breakdown(plan))


def host_bytes(
    plan: Plan, facts: ModelFacts, profile: HardwareProfile, limits: Limits, request: Request,
    calibration: Calibration = MEASURED,
) -> int:  # fmt: skip
    """RAM that the process takes under a plan that was made from these arguments, weights that wait there included."""
    search = Search(facts, profile, limits, request, _same_arithmetic(plan, facts, profile, limits), calibration)
    if not search.on_card:
        return plan.prediction.peak_bytes if plan.prediction is not None else 0
    return calibration.host_bytes + search.waiting_bytes(plan.residency)


def _same_arithmetic(plan: Plan, facts: ModelFacts, profile: HardwareProfile, limits: Limits) -> ComputeConfig:
    for how, _ in compute_configs(facts, profile, limits.overrides):
        if how.dtype == plan.dtype:
            return how
    raise AssertionError("the plan was made from other arguments")


def _plan(search: Search, best: Candidate, reasons: dict[str, str]) -> Plan:
    how, limits, request = search.how, search.limits, search.request
    room = None
    if limits.context_store is not None:
        room, why = context_room(search, best, limits.context_store)
        reasons = {**reasons, "context store": why}
        if room is not None and room.place == "device":
            best = best._replace(peak=best.peak + room.nbytes)
    return Plan(
        device=how.device,
        dtype=how.dtype,
        residual_dtype=how.residual_dtype,
        vae_dtype=how.vae_dtype,
        attention=how.attention,
        linears=limits.overrides.backend if limits.overrides.backend != "auto" else _backend(how),
        tasks=request.tasks,
        guidance_batch=best.batch,
        graph_tokens=best.graph_tokens,
        residency=best.residency,
        max_vram=limits.max_vram,
        context_store=room,
        prediction=Prediction(best.peak, best.step_bytes, best.seconds),
        reasons=reasons | explain(search, best),
    )


def _backend(how: ComputeConfig) -> str:
    """DFloat11 that cannot stay compressed is asked for by name, because memory was planned for it."""
    return "cpu" if how.decoded_at_load else "auto"


def _less_talk(request: Request, fits: Callable[..., bool]) -> Iterator[str]:
    """Of a conversation: fewer turns, or fewer pictures in an answer."""
    asked = request.conversation
    if asked is None:
        return

    def with_talk(**about: int) -> Request:
        return replace(request, conversation=replace(asked, **about))

    turns = most_frames(lambda count: fits(request=with_talk(turns=count)), asked.turns)
    if turns:
        yield f"plan for {turns} {'turns' if turns > 1 else 'turn'} of a chat"
        return
    rounds = most_frames(lambda count: fits(request=with_talk(turns=1, rounds=count - 1)), asked.rounds + 1) - 1
    if rounds >= 0:
        yield f"plan for one turn with max_rounds {rounds}"


def _what_would_fit(
    facts: ModelFacts,
    profile: HardwareProfile,
    limits: Limits,
    request: Request,
    calibration: Calibration,
    need: Need,
) -> str:
    """One line: what is needed, what there is, and which changes would do."""

    def fits(facts: ModelFacts = facts, request: Request = request, limits: Limits = limits) -> bool:
        return any(
            Search(facts, profile, limits, request, how, calibration).best() is not None
            for how, _ in compute_configs(facts, profile, limits.overrides)
        )

    how, _ = next(iter(compute_configs(facts, profile, limits.overrides)))
    reserve = Search(facts, profile, limits, request, how, calibration).reserve
    remedies = []
    if request.frames > 1:
        most = most_frames(lambda count: fits(request=replace(request, frames=count)), request.frames)
        remedies += [f"plan for {most} {'frames' if most > 1 else 'frame'}"] if most else []
    remedies += _less_talk(request, fits)
    if need.lowest == inf:
        if limits.max_ram is not None and fits(limits=replace(limits, max_ram=None)):
            remedies.append("raise max_ram")
    elif limits.max_vram is not None and fits(limits=replace(limits, max_vram=int(need.lowest) + reserve)):
        remedies.append(f"raise max_vram to {format_bytes(need.lowest + reserve)}")
    free_choice = replace(limits, overrides=replace(limits.overrides, backend="auto"))
    for form in formats():
        if form != facts.format and fits(ModelFacts.of_config(facts.config, form), limits=free_choice):
            remedies.append(f"convert to {form}")
            break
    if request.step_cache != "none" and fits(request=replace(request, step_cache="none")):
        remedies.append("draw without the step cache")
    for side in SMALLER_SIDES:
        smaller = replace(request, height=min(side, request.height), width=min(side, request.width))
        if "gen" in request.experts and smaller != request and fits(request=smaller):
            remedies.append(f"plan for pictures of {side}x{side}")
            break
    for task in request.tasks:
        if len(request.tasks) > 1 and fits(request=replace(request, tasks=(task,), conversation=None)):
            remedies.append(f"load it for {task} alone")
            break
    tasks = ", ".join(request.tasks)
    frames = f" {request.frames} frames" if request.frames > 1 else ""
    size = f"{frames} at {request.width}x{request.height}" if "gen" in request.experts else ""
    talk = _chat_in_words(request)
    remedy = "; or ".join(remedies) or "use a machine with more memory"
    return f"{facts.format} does not fit for {tasks}{talk}{size}: {need.line}; {remedy}"


def _chat_in_words(request: Request) -> str:
    asked = request.conversation
    return "" if asked is None else f" and chats (turns: {asked.turns}, pictures each: {asked.rounds})"
