"""What the planner expects and what was measured, on every row of every committed report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from lowmem_bagel.benchmarks.measuring import Conditions, load_settings
from lowmem_bagel.benchmarks.report import predicting
from lowmem_bagel.benchmarks.rows import Row
from support.paths import RESULTS

from lowmem_bagel.hardware.profile import CONTEXT_BYTES, GIB, Availability, HardwareProfile, as_switched
from lowmem_bagel.planner.calibration import MEASURED
from lowmem_bagel.planner.compute import compute_configs
from lowmem_bagel.planner.estimate import PlanInputs, plan_from, predicted_seconds
from lowmem_bagel.planner.load_options import options_from
from lowmem_bagel.planner.plan import Plan, Residency
from lowmem_bagel.planner.search import Search

REPORTS = sorted(RESULTS.glob("report*.json"))
SECONDS, BYTES = 0.15, 0.07
KNOWN = {
    **{
        ("report_gguf_h200", f"gguf-{kind}::ask seconds"): "one token's products were taken for dequantised ones"
        for kind in ("q8_0", "q6_k", "q5_k", "q4_k")
    },
}  # fmt: skip
"""What was off, and why."""
KNOWN_TODAY: dict[tuple[str, str], str] = {}
"""What today's planner expects otherwise, because the code has changed since."""
COPY_GBPS = 55.44
"""From page-locked memory to that card, as the report's planner took it."""


def pairs(record: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(row and figure, expected, measured, tolerance) of all that is both. Of rows on a processor the time of a small
    model is the interpreter's, which nobody plans for."""
    found = []
    for row in record["results"]["rows"]:
        if row["state"] != "measured" or not row.get("predicted") or "gpu" not in record["hardware"]:
            continue
        taken = at_peak(row["bytes"])
        expected = row["predicted"]
        found.append((f"{row['row']} seconds", expected["seconds"], row["seconds"]["median"], SECONDS))
        if taken:
            found.append((f"{row['row']} bytes", expected["peak_bytes"], taken, BYTES))
    return found


def at_peak(nbytes: dict[str, Any]) -> float:
    """What the card holds is asked after a row; at the peak it held no less than PyTorch reserved, and the context."""
    held = nbytes.get("process") or nbytes.get("device") or 0
    return max(held, nbytes["reserved"] + CONTEXT_BYTES if nbytes.get("reserved") else 0)


def off(record: dict[str, Any]) -> list[str]:
    return [
        f"{what}: {expected:.4g} expected, {measured:.4g} measured"
        for what, expected, measured, tolerance in pairs(record)
        if abs(expected / measured - 1) > tolerance
    ]


@pytest.mark.parametrize("name", [path.stem for path in REPORTS])
def test_planner_and_measurement_agree(name: str) -> None:
    check(name, read(name), KNOWN)


@pytest.mark.parametrize("name", [path.stem for path in REPORTS])
def test_the_planner_of_today_agrees_as_well(name: str) -> None:
    """With units and parts where they were when it was measured, whatever would be planned today."""
    record = read(name)
    if "gpu" in record["hardware"]:
        check(name, {**record, "results": {"rows": list(planned_today(record))}}, KNOWN_TODAY)


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def check(name: str, record: dict[str, Any], known: dict[tuple[str, str], str]) -> None:
    found, excused = off(record), [what for of, what in known if of == name]
    assert [line for line in found if line.split(": ")[0] not in excused] == []
    assert len(found) == len(excused), "one is not off any more"


def planned_today(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The measured rows of a report of an H200, with today's predictions."""
    settings, gpu_bytes = record["settings"], record["hardware"]["gpu_bytes"]
    whole = HardwareProfile.hypothetical(gpu_bytes / GIB, (9, 0), 256, COPY_GBPS, name="H200")
    card = as_switched(replace(whole, packages={name: Availability(True, "1") for name in ("triton", "nvrtc")}))
    conditions = Conditions(
        settings["shape"], "cuda:0", settings["size"], settings["num_timesteps"], settings["max_new_tokens"], 1, 1.0,
        None,
    )  # fmt: skip
    for found in record["results"]["rows"]:
        row = Row.parse(found["row"])
        # Another package's speed is not planned, and adapters are planned from a folder that has them.
        if found["state"] == "measured" and found.get("predicted") and not row.lora:
            options = options_from(load_settings(row, conditions))
            inputs = predicting.Machine(card).inputs(predicting._facts(row, conditions), options)
            plan = plan_from(inputs, options)
            yield found | {"predicted": placed_as(found, inputs, plan, row, conditions)}


def placed_as(
    found: dict[str, Any], inputs: PlanInputs, plan: Plan, row: Row, conditions: Conditions
) -> dict[str, float]:
    """Predictions for the placement that a row was measured with."""
    configs = compute_configs(inputs.facts, inputs.profile, inputs.limits.overrides)
    how = next(how for how, _ in configs if how.dtype == plan.dtype)
    search = Search(inputs.facts, inputs.profile, inputs.limits, inputs.request, how, MEASURED)
    streamed = tuple(sorted(search.order[: found["streamed_units"]]))
    residency = Residency(streamed, found["slots"], found["source"], tuple(found["staged"]))
    placed = replace(plan, residency=residency, guidance_batch=found["guidance_batch"])
    workload = predicting._workload(inputs.facts, row, conditions, conditions.max_new_tokens)
    return {
        "seconds": sum(predicted_seconds(placed, inputs, workload).values()),
        "peak_bytes": max(phase.total for phase in search.breakdown(placed)),
    }


def test_a_row_that_is_off_is_named() -> None:
    row = {
        "row": "int8::generate", "state": "measured", "seconds": {"median": 10.0}, "bytes": {"device": 100},
        "predicted": {"seconds": 11.6, "peak_bytes": 106},
    }  # fmt: skip
    record = {"hardware": {"gpu": "a card"}, "results": {"rows": [row, {"row": "x", "state": "failed"}]}}
    assert off(record) == ["int8::generate seconds: 11.6 expected, 10 measured"]
