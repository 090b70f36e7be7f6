"""lowmem_bagel/planner/fidelity.json: what formats, attention and step caches lose, from records, for `choose`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from .page import Records

ERRORS = "codec_errors_demo_checkpoint"
VELOCITIES = "fidelity_demo"
ATTENTION = "accuracy_demo_attention"
FORMATS, FP16 = "accuracy_demo", "accuracy_demo_fp16"
STEP_CACHES = "accuracy_demo_caches", "accuracy_demo_speeds", "accuracy_demo_half", "accuracy_demo_late"


@dataclass(frozen=True)
class FidelityData:
    """The packaged data. It is written whole, so that it has no parts."""

    path: str = "lowmem_bagel/planner/fidelity.json"
    parts: Mapping[str, Any] = field(default_factory=dict)
    drawing: None = None

    def text(self, records: Records, now: str) -> str:
        formats = _formats(records)
        for name, error in _velocities(records[VELOCITIES]):
            if name in formats:
                formats[name] |= {"velocity_error": error, "records": [*formats[name]["records"], VELOCITIES]}
        found = {"formats": formats, "attention": _attention(records), "step_caches": _step_caches(records)}
        return json.dumps(found, indent=1) + "\n"


def _velocities(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Formats beside the source: relative L2 of a picture's first guided velocity, which no step cache changes."""
    for variant in record["results"]["variants"]:
        if variant["kind"] == "format" and variant["state"] == "measured":
            yield variant["name"], variant["velocity"]["first_guided"]


def _formats(records: Records) -> dict[str, Any]:
    """By format: the median error of a linear's output, in the arithmetic that runs it, and points of each task."""
    found: dict[str, dict[str, Any]] = {}
    errors: dict[str, list[float]] = {}
    for row in records[ERRORS]["results"]:
        errors.setdefault(row["format"], []).append(row["arithmetic"])
    for name, of_tensors in errors.items():
        found[name] = {"output_error": median(of_tensors), "records": [ERRORS]}
    for name, points in _points(records[FORMATS]):
        about = found.setdefault(name, {"records": []})
        about |= {"points": points, "records": [*about["records"], FORMATS]}
    ways = [points for _, points in _points(records[FP16])]
    found["fp16"] |= {
        "points": {task: min(points[task] for points in ways) for task in ways[0]},
        "records": [ERRORS, FP16],
    }
    return found


def _attention(records: Records) -> dict[str, Any]:
    """By backend, in float32 beside what is exact: points of each task."""
    found = _points(records[ATTENTION])
    return {way.partition(":")[2]: {"points": points, "records": [ATTENTION]} for way, points in found}


def _step_caches(records: Records) -> dict[str, Any]:
    """By step cache: points of each task, and how far the median picture is from the exact one, in levels of 255."""
    found = {}
    for name in STEP_CACHES:
        tasks = {cache: row["tasks"] for cache, row in records[name]["results"].items()}
        for cache, points in _points(records[name]):
            distance = {task: row["median_distance"] for task, row in tasks[cache].items() if "median_distance" in row}
            found[cache] = {"points": points, "distance": distance, "records": [name]}
    return found


def _points(record: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """What was judged beside the source, and its points above the source by task."""
    for name, found in record["results"].items():
        if name != "source":
            yield name, {task: row["points_above_source"] for task, row in found["tasks"].items()}


FIDELITY = FidelityData()
