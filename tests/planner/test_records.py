"""Today's planner against what was measured: the committed rows of `bench engine`, planned again for that card."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from lowmem_bagel.benchmarks.record import read_records
from lowmem_bagel.benchmarks.rows import Row
from support.paths import RESULTS

from lowmem_bagel.checkpoint.adapters import values_beside
from lowmem_bagel.checkpoint.tensors import tensor_table
from lowmem_bagel.hardware.features import VARIABLE
from lowmem_bagel.hardware.profile import CONTEXT_BYTES, GIB, Availability, HardwareProfile, as_switched
from lowmem_bagel.planner.facts import NOTHING_BESIDE, ModelFacts
from lowmem_bagel.planner.solve import Limits, Request, make_plan
from lowmem_bagel.sampling.step_caches.registry import step_cache

RECORDS = (
    "engine_h200",
    "engine_limits_h200",
    "engine_h200_as_turing",
    "engine_h200_as_turing_plain",
    "engine_h200_without_triton",
    "engine_h200_without_triton_plain",
    "engine_adapters_h200",
    "engine_nf4_adapter_h200",
    "engine_tuning_h200",
    "engine_moe_h200",
)
NOT_PLANNED = {"bitsandbytes", "quanto", "dfloat11"}
"""Backends that are other packages' kernels, which the planner takes for ours."""
SUPERSEDED = {"engine_tuning_h200 int8:lora=16", "engine_tuning_h200 nf4:lora=16"}
"""Rows that later commits measured anew, in engine_adapters_h200 and engine_nf4_adapter_h200: adapters were slower, and
beside NF4 took more memory."""
SECONDS, BYTES = 0.15, 0.07
"""How far a prediction may be from what was measured."""


def measured() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Rows that are planned, each with its record."""
    records, found = read_records(RESULTS), dict[str, tuple[dict[str, Any], dict[str, Any]]]()
    for name in RECORDS:
        record = records[name]
        for figures in record["results"]:
            row = Row.parse(figures["row"])
            title = f"{name} {figures['row']}"
            if row.backend not in NOT_PLANNED and row.offload == "native" and title not in SUPERSEDED:
                found[title] = figures, record
    return found


MEASURED = measured()


def with_adapter(facts: ModelFacts, rank: int) -> ModelFacts:
    """The facts of a variant beside which factors of this rank are kept for all that draws."""
    change: Any = SimpleNamespace(rank=rank)
    table = tensor_table(facts.config)
    changed = {spec.name.removesuffix(".weight"): [change] for spec in table.values() if spec.expert == "gen"}
    beside = values_beside(changed if rank else {}, table)
    units = {unit: replace(stored, beside=beside.get(unit, NOTHING_BESIDE)) for unit, stored in facts.units.items()}
    return replace(facts, units=units)


@pytest.mark.parametrize("name", MEASURED)
def test_what_was_measured_is_predicted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figures, record = MEASURED[name]
    row, settings, hardware = Row.parse(figures["row"]), record["settings"], record["hardware"]
    monkeypatch.setenv(VARIABLE, ",".join(record.get("switched_off", ())))
    whole = HardwareProfile.hypothetical(
        hardware["gpu_bytes"] / GIB, (9, 0), 256, settings["pinned_copy_gbps"], name="H200"
    )
    card = as_switched(replace(whole, packages={name: Availability(True, "1") for name in ("triton", "nvrtc")}))
    limits = Limits(max_vram=int(row.limit_gb * 1e9) or None)
    request = Request(
        tasks=(row.task,),
        new_tokens=settings["max_new_tokens"],
        step_cache=row.step_cache,
    )
    plan = make_plan(with_adapter(ModelFacts.of_shape(row.format, settings["shape"]), row.lora), card, limits, request)
    assert plan.prediction is not None
    seconds, predicted = figures["seconds"]["median"], plan.prediction.seconds
    assert predicted is not None
    if step_cache(row.step_cache).depends_on_picture:
        assert seconds < (1 + SECONDS) * predicted, "as many evaluations as there can be are planned for"
    else:
        assert predicted == pytest.approx(seconds, rel=SECONDS)
    assert plan.prediction.peak_bytes == pytest.approx(in_use(figures), rel=BYTES)


def in_use(figures: dict[str, Any]) -> int:
    """The card's memory at its fullest: read after the request, when PyTorch may have given some back, or what it had
    reserved at most, beside the process's context."""
    return max(int(figures["device_used_bytes"]), int(figures["reserved_bytes"]) + CONTEXT_BYTES)
