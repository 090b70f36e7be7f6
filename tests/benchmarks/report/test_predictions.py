"""What the planner expects and what was measured, on every row of every committed report."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.paths import RESULTS

REPORTS = sorted(RESULTS.glob("report*.json"))
SECONDS, BYTES = 0.15, 0.07


def pairs(record: dict[str, Any]) -> list[tuple[str, float, float, float]]:
    """(row and figure, expected, measured, tolerance) of all that is both. Of rows on a processor the time of a small
    model is the interpreter's, which nobody plans for."""
    found = []
    for row in record["results"]["rows"]:
        if row["state"] != "measured" or not row.get("predicted") or "gpu" not in record["hardware"]:
            continue
        taken = row["bytes"].get("process") or row["bytes"].get("device")
        expected = row["predicted"]
        found.append((f"{row['row']} seconds", expected["seconds"], row["seconds"]["median"], SECONDS))
        if taken:
            found.append((f"{row['row']} bytes", expected["peak_bytes"], taken, BYTES))
    return found


def off(record: dict[str, Any]) -> list[str]:
    return [
        f"{what}: {expected:.4g} expected, {measured:.4g} measured"
        for what, expected, measured, tolerance in pairs(record)
        if abs(expected / measured - 1) > tolerance
    ]


@pytest.mark.parametrize("name", [path.stem for path in REPORTS])
def test_planner_and_measurement_agree(name: str) -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert not off(record), "\n".join(off(record))


def test_a_row_that_is_off_is_named() -> None:
    row = {
        "row": "int8::generate", "state": "measured", "seconds": {"median": 10.0}, "bytes": {"device": 100},
        "predicted": {"seconds": 11.6, "peak_bytes": 106},
    }  # fmt: skip
    record = {"hardware": {"gpu": "a card"}, "results": {"rows": [row, {"row": "x", "state": "failed"}]}}
    assert off(record) == ["int8::generate seconds: 11.6 expected, 10 measured"]
