"""docs/older-gpus.md: what the planner expects of them, and the nearest things that were measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .measured import Columns, Measured, gigabytes, measured
from .page import Page, Records, table

Prediction = Mapping[str, Any]
TASKS = ("generate", "edit", "ask")


def predictions(records: Records) -> str:
    """One line a card and format: seconds of each task, and peak memory of drawing."""
    by_key: dict[tuple[str, str], dict[str, Prediction]] = {}
    for row in records["predictions_older_cards"]["results"]:
        by_key.setdefault((row["card"], row["format"]), {})[row["task"]] = row
    return prediction_table(by_key.values())


def prediction_table(rows: Iterable[Mapping[str, Prediction]]) -> str:
    """Predictions by task -> one line each."""

    def drawn(cell: Callable[[Prediction], str], otherwise: str = "") -> Callable[[Mapping[str, Prediction]], str]:
        return lambda tasks: cell(tasks["generate"]) if tasks["generate"]["fits"] else otherwise

    def waiting(row: Prediction) -> str:
        return " + ".join(f"{count} {place}" for place, count in row["waiting"].items()) or "none"

    columns: Mapping[str, Callable[[Mapping[str, Prediction]], str]] = {
        "card": lambda tasks: tasks["generate"]["card"],
        "format": lambda tasks: tasks["generate"]["format"],
        "linears": drawn(lambda row: row["reasons"]["linears"].split(":")[0], "does not fit"),
        "picture": lambda tasks: _duration(tasks["generate"]),
        "edit": lambda tasks: _duration(tasks["edit"]),
        "answer": lambda tasks: _duration(tasks["ask"]),
        "peak": drawn(lambda row: f"{row['peak_bytes'] / 1e9:.1f} GB"),
        "streamed of 56": drawn(waiting),
    }
    return table(columns, rows)


def _duration(row: Prediction) -> str:
    if not row["fits"]:
        return "does not fit"
    seconds = row["seconds"]
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def words(m: Measured) -> str:
    return f"{m.row.format}{m.limit}, {'answer' if m.row.task == 'ask' else 'picture'}"


def stand_in(records: Records) -> str:
    """The stand-in for Turing, and beside it what PyTorch's operations take."""
    plain = measured(records, "engine_h200_as_turing_plain")
    columns: Columns = {
        "": words,
        "our kernels": lambda m: m.result,
        "PyTorch's operations": _result_of(plain),
        "allocated": lambda m: f"{gigabytes('peak_bytes')(m)} GB",
        "in use on the card": lambda m: f"{gigabytes('device_used_bytes')(m)} GB",
        "streamed of 56": lambda m: str(m.figures["streamed_units"] or "none"),
    }
    return table(columns, measured(records, "engine_h200_as_turing").values())


def without_triton(records: Records) -> str:
    """A modern card with Triton, without, and without NVRTC too."""
    columns: Columns = {
        "": words,
        "Triton": _result_of(measured(records, "engine_h200")),
        "NVRTC alone": lambda m: m.result,
        "neither": _result_of(measured(records, "engine_h200_without_triton_plain")),
    }
    return table(columns, measured(records, "engine_h200_without_triton").values())


def _result_of(rows: Mapping[str, Measured]) -> Callable[[Measured], str]:
    """The same row's of another run, where it was measured."""
    return lambda m: rows[m.figures["row"]].result if m.figures["row"] in rows else ""


OLDER_GPUS = Page(
    "docs/older-gpus.md", {"predictions": predictions, "stand-in": stand_in, "without Triton": without_triton}
)
