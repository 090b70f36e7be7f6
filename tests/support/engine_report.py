"""Rows of `bench engine` in the shape of a record of `bench report`: rows enough to draw."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from lowmem_bagel.benchmarks.pages.measured import RUNS, Measured, measured
from lowmem_bagel.benchmarks.pages.page import Records


def report_of_engine(records: Records) -> dict[str, Any]:
    """One record of the runs that docs/performance.md shows; what they did not measure is left out."""
    first = records[RUNS[0]]
    rows = measured(records).values()
    return {
        "benchmark": "report",
        "command": "; ".join(str(records[run].get("command", "")) for run in RUNS).strip("; "),
        "commit": " and ".join(records[run]["commit"] for run in RUNS),
        **{name: first[name] for name in ("hardware", "versions")},
        "settings": {**first["settings"], **records[RUNS[1]]["settings"]},
        "results": {"rows": [_row(row) for row in rows if "seconds" in row.figures]},
    }


def _row(found: Measured) -> dict[str, Any]:
    row, figures = found.row, found.figures
    return {
        **{name: getattr(row, name) for name in ("format", "limit_gb", "task", "backend", "offload", "step_cache")},
        "row": figures["row"],
        "dtype": row.dtype,
        "lora": row.lora,
        "state": "measured",
        "seconds": _seconds(figures),
        "phases": {
            name: median(run[name]["seconds"] for run in figures["runs"]) for name in figures["runs"][0]
        },
        "tokens_per_second": figures.get("tokens_per_second"),
        "bytes": {
            name: figures[key]
            for name, key in (
                ("allocated", "peak_bytes"), ("reserved", "reserved_bytes"), ("device", "device_used_bytes"),
            )
        },
        "predicted": figures["predicted"],
        "extrapolated": figures.get("extrapolated"),
    }  # fmt: skip


def _seconds(figures: Mapping[str, Any]) -> dict[str, float]:
    """Of a whole picture, where fewer steps were measured."""
    whole = figures.get("extrapolated_seconds")
    return {name: whole or value for name, value in figures["seconds"].items()}
