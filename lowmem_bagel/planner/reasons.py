"""Why a plan's placement is what it is, in one line a choice. Pure; no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..sampling.step_caches.none import NONE
from ..units import format_bytes
from .compute import is_exact
from .fidelity import measured
from .memory import Workload, states_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .plan import Place, Residency
    from .search import Candidate, Search

ROLE = {
    "embedding": "a lookup, which RAM can do",
    "lm_head": "on the device only while text is generated",
    "vit": "on the device only while pictures are looked at",
    "vae": "on the device only at the ends",
}
CHANGED = {"a drawing": "drawings", "an edit": "edits"}
WAITING: Mapping[Place, str] = {"pinned": "in page-locked RAM", "pageable": "in plain RAM", "disk": "on disk"}


def explain(search: Search, best: Candidate) -> dict[str, str]:
    """Reasons by the name of what was chosen."""
    request = search.request
    reasons = {"exactness": _exactness(search), "memory": _memory(search, best)}
    for part in best.residency.staged:
        reasons[f"{part} in RAM"] = ROLE[part] + (", and not needed here" if part in request.idle_parts else "")
    if search.on_card:
        reasons |= _placement(search, best)
    if "gen" in request.experts and search.workloads[0].guided_branches > 1:
        reasons["guidance_batch"] = _guidance(best)
    if best.graph_tokens:
        passes = f"passes of up to {best.graph_tokens} tokens"
        reasons["pictures by graph"] = f"{passes}: the host may take longer to launch than the card to compute"
    if "gen" in request.experts and request.step_cache != "none":
        reasons["step_cache"] = _step_cache(search, best)
    relevant = {"card", "processor"} | ({"copies"} if best.residency.streamed else set()) | {*best.residency.waiting()}
    assumed = [text for about, text in search.machine.assumptions.items() if about in relevant]
    if assumed:
        reasons["assumptions"] = "; ".join(assumed)
    return reasons


def _exactness(search: Search) -> str:
    if is_exact(search.facts, search.how):
        return "weights keep the checkpoint's bits"
    if search.facts.rounded:
        return "the checkpoint was not bf16, and conversion rounded its weights; inspect shows by how much"
    if search.facts.wider:
        return f"the checkpoint is wider than {search.how.dtype}: its weights are rounded as they are loaded"
    if search.facts.lossless:
        return "lossless on disk; float16 keeps the bits of weights inside its normal range"
    return f"{search.facts.format} is lossy; inspect shows its measured errors"


def _memory(search: Search, best: Candidate) -> str:
    where = "GPU memory" if search.on_card else "RAM"
    limit = format_bytes(search.device_limit)
    if search.on_card:
        reserve = format_bytes(search.promise - search.device_limit)
        limit = f"{limit} ({format_bytes(search.promise)} less a reserve of {reserve})"
    return f"predicted peak {format_bytes(best.peak)} of {where}, limit {limit}"


def _placement(search: Search, best: Candidate) -> dict[str, str]:
    total, residency = len(search.units), best.residency
    if not residency.streamed:
        return {"residency": f"all {total} layer units fit on the device"}
    nbytes = sum(search.units[unit] for unit in residency.streamed)
    pairs = len(residency.streamed) > search.facts.config.decoder.num_layers
    return {
        "residency": f"{total - len(residency.streamed)} of {total} layer units fit on the device; the other "
        f"{format_bytes(nbytes)} stream, spread evenly so that copies hide behind arithmetic",
        "slots": "two hold a layer, the others are filled meanwhile" if pairs else "one in use, one being filled",
        "source": _source(search, residency),
    }


def _source(search: Search, residency: Residency) -> str:
    """How many units wait where, and what kept the others from the faster places."""
    waiting = residency.waiting()
    sizes = {place: format_bytes(sum(search.units[unit] for unit in units)) for place, units in waiting.items()}
    if [*waiting] == ["pinned"]:
        return f"{sizes['pinned']} of RAM can be page-locked"
    shares = ", ".join(f"{len(units)} units ({sizes[place]}) {WAITING[place]}" for place, units in waiting.items())
    limits = []
    if "pageable" in waiting:
        limits.append(f"only {format_bytes(search.profile.pin_limit)} can be page-locked")
    if "disk" in waiting:
        limits.append(f"RAM has room for {format_bytes(max(search.ram, 0))} in all")
    return f"{', '.join(limits)}: {shares}"


def _step_cache(search: Search, best: Candidate) -> str:
    """Of the task that keeps most."""
    workload = max(search.workloads, key=lambda workload: workload.guided_branches)
    together = workload.guided_branches if best.batch else 1
    config, how, plain = search.facts.config, search.how, replace(workload, step_cache=NONE, stored_states=0)
    more = states_bytes(config, how, workload, together) - states_bytes(config, how, plain, together)
    # What keeps its results itself may hold less than what would wait for the other branches.
    kept = f"keeps up to {format_bytes(max(more, 0))} more while it draws"
    evaluations = search.request.timesteps - 1
    if workload.step_cache.depends_on_picture:
        return f"{kept}; what it skips depends on the picture, so the seconds are those of computing all steps"
    return f"{kept}; {workload.steps} of {evaluations} steps are computed, the others predicted{_change(workload)}"


def _change(workload: Workload) -> str:
    """How much pictures change by a step cache, where it was measured."""
    found = measured()["step_caches"].get(workload.step_cache.name, {}).get("distance", {})
    words = [f"{name} by {found[task]:.2g}" for name, task in CHANGED.items() if task in found]
    return f"; the demo's median picture changes, in levels of 255: {', '.join(words)}" if words else ""


def _guidance(best: Candidate) -> str:
    if best.batch:
        return "one batch: weights are read, copied and decoded once for all branches"
    return "one branch at a time: a batch's activations take memory that serves weights better"
