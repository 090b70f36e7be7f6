"""From what was measured of a row to its figures in the record."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .watching import Meters

KEPT = (
    "tokens_per_second", "tokens", "first_token_seconds", "energy_joules", "energy_why", "linears", "attention",
    "guidance_batch", "streamed_units", "streamed_bytes", "staged", "source", "slots", "finite", "evaluations",
    "evaluations_computed", "equals_reference", "relative_l2_to_reference", "transfer_seconds", "times_the_bound",
    "reasons", "runs", "meters_why",
)  # fmt: skip
"""Figures that the record has under their own names."""


def figures_of(found: dict[str, Any], watch: Meters) -> dict[str, Any]:
    """The record's figures of a measured row; `seconds` are always of a whole picture or answer, and `extrapolated`
    says where they were not measured whole."""
    seconds, said = _whole(found, watch)
    runs = found["runs"]
    denoise = [run["denoise"]["seconds"] for run in runs if "denoise" in run]
    return {
        **{name: found.get(name) for name in KEPT},
        **watch.sizes,
        "seconds": seconds,
        "measured_seconds": found["seconds"],
        "phases": {name: statistics.median(run[name]["seconds"] for run in runs) for name in runs[0]},
        "step_seconds": statistics.median(denoise) / watch.steps if denoise else None,
        "load_seconds": {"cold": watch.cold_seconds, "warm": found["load_seconds"]},
        "bytes": {
            "allocated": found["peak_bytes"], "reserved": found.get("reserved_bytes"),
            "process": found["process_bytes"], "device": found["device_bytes"] or found.get("device_used_bytes"),
            "ram": found["ram_bytes"], "copied": found["copied_bytes"],
        },
        "predicted": found["expected"],
        "extrapolated": said,
    }  # fmt: skip


def _whole(found: dict[str, Any], watch: Meters) -> tuple[dict[str, float], str | None]:
    """Seconds of the whole, and how they were extrapolated."""
    if "extrapolated_seconds" in found:
        factor = found["extrapolated_seconds"] / found["seconds"]["min"]
        return {name: value * factor for name, value in found["seconds"].items()}, found["extrapolated"]
    wanted, tokens = watch.conditions.max_new_tokens, found.get("tokens", 0)
    if not watch.shortened or tokens < watch.shortened or tokens < 2:
        return found["seconds"], None
    rest = [sum(p["seconds"] for n, p in run.items() if n != "answer") for run in found["runs"]]
    each = [run["answer"]["seconds"] / (tokens - 1) * (wanted - 1) for run in found["runs"]]
    whole = [a + b for a, b in zip(rest, each, strict=True)]
    said = f"from {tokens} tokens measured to the {wanted} of a whole answer"
    return {"median": statistics.median(whole), "min": min(whole), "max": max(whole)}, said
