"""A record is checked as it is read: what is no record of ours is refused in a line, whatever it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from lowmem_bagel.benchmarks.report.reading import read_report, report_of
from support.paths import RESULTS
from support.report_records import report_record

from lowmem_bagel.checkpoint.config import read_json
from lowmem_bagel.errors import SettingError
from lowmem_bagel.hardware.profile import CONTEXT_BYTES

RECORD = report_record()


def test_rows_are_read_with_their_states() -> None:
    report = report_of(RECORD, Path("report.json"))
    labels = [row.label for row in report.rows]
    assert "INT8 in 8 GB" in labels and "bf16, TaylorSeer" in labels and "NF4, by bitsandbytes" in labels
    assert "bf16 in 24 GB, by accelerate, timesteps 3" in labels
    assert [row.state for row in report.rows if not row.is_measured] == ["out of memory", "failed", "not here"]
    assert report.memory_key == "device" and report.card == "H200"
    start = report.startup[0]
    assert sum(start.warm.values()) == pytest.approx(11.5), "a sum among the phases would count them twice"
    assert (start.cold_first_step, start.warm_first_step) == (22.5, 3.5)
    measured = {row["row"]: row for row in read_json(RESULTS / "engine_h200.json")["results"]}
    used = measured["int8"]["device_used_bytes"]
    assert next(report.memory(row) for row in report.rows if row.row == "int8") == pytest.approx(used / 1e9)


def test_a_card_held_no_less_than_was_reserved() -> None:
    """After a row parts that visited the card have left it."""
    given = {"format": "int8", "bytes": {"process": 6.3e9, "reserved": 6.59e9, "ram": 7e9}}
    (row,) = report_of({"benchmark": "report", "results": {"rows": [given]}}, Path("report.json")).rows
    assert row.held == row.at_peak("process") == pytest.approx(6.59 + CONTEXT_BYTES / 1e9) and row.at_peak("ram") == 7


def test_what_is_missing_is_none_and_nothing_is_made_up() -> None:
    report = report_of({"benchmark": "report", "results": {"rows": [{"format": "int8"}]}}, Path("report.json"))
    (row,) = report.rows
    assert (row.seconds, row.predicted_seconds, row.load_cold, row.bytes) == (None, None, None, {})
    assert not report.fidelity and not report.startup and report.choice is None and report.card_gb is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON"),
        ("[1]", "the record is no object"),
        ('{"benchmark": "engine", "results": []}', "its benchmark is 'engine'"),
        ('{"results": {}}', "its benchmark is 'not named'"),
        ('{"benchmark": "report", "results": {"rows": []}}', "it has no rows"),
        ('{"benchmark": "report", "results": {"rows": [{}]}}', "names no format"),
        ('{"benchmark": "report", "results": {"rows": 3}}', "rows of results is '3'"),
        ('{"benchmark": "report", "results": {"rows": [{"format": "x", "seconds": {"median": NaN}}]}}', "no JSON"),
    ],
)
def test_a_foreign_or_broken_record_is_refused_in_a_line(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingError, match=r"report\.json is no record of bench report") as refusal:
        read_report(path)
    assert why in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_record_that_is_not_there_is_refused_in_a_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(SettingError, match="cannot be read"):
            read_report(path)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or list with every key or index in it."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield value, key
        yield from places(inner)


def short() -> dict[str, Any]:
    """One row, one variant, one start."""
    record = deepcopy(RECORD)
    results = record["results"]
    results["rows"] = results["rows"][:1]
    results["fidelity"]["variants"] = results["fidelity"]["variants"][1:2]
    results["startup"]["rows"] = results["startup"]["rows"][:1]
    return record


@pytest.mark.parametrize("wrong", ["text", [1, {}], {"a": [None]}, 7, True, None], ids=str)
def test_a_wrong_value_anywhere_is_refused_or_read(wrong: Any) -> None:
    """Never another error than ours."""
    refused = 0
    for number in range(len(list(places(short())))):
        record = short()
        holder, key = list(places(record))[number]
        holder[key] = wrong
        try:
            report_of(json.loads(json.dumps(record)), Path("report.json"))
        except SettingError:
            refused += 1
    assert refused or wrong is None
