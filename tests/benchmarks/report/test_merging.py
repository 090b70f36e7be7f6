"""`bench report --merge`: rows of several commits together, each telling its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lowmem_bagel.benchmarks.report import tables
from lowmem_bagel.benchmarks.report.reading import read_report
from lowmem_bagel.benchmarks.report.store import merged
from support.report_records import report_record

from lowmem_bagel.errors import SettingError


def written(place: Path, record: dict[str, Any]) -> Path:
    place.mkdir()
    (place / "report.json").write_text(json.dumps(record))
    return place


def test_what_is_measured_again_takes_the_place_of_what_was_and_tells_its_commit(tmp_path: Path) -> None:
    before, again = report_record(), report_record()
    for record, commit, rows in ((before, "aaa", slice(None)), (again, "bbb", slice(0, 2))):
        record |= {"commit": commit}
        record["results"]["rows"] = record["results"]["rows"][rows]
    for row in again["results"]["rows"]:
        row["seconds"] = {"median": 123.0, "min": 123.0, "max": 123.0}
    assert all(row["state"] == "measured" for row in again["results"]["rows"])
    places = [written(tmp_path / "before", before), written(tmp_path / "again", again)]
    found = read_report(merged(places, tmp_path / "out"))
    assert [row.row for row in found.rows] == list(dict.fromkeys(row["row"] for row in before["results"]["rows"]))
    assert [row.median for row in found.rows[:2]] == [123, 123] and found.rows[2].median != 123
    assert [row.commit for row in found.rows[:3]] == ["bbb", "bbb", ""] and found.commit == "aaa, 2 rows of bbb"
    shown = tables.measured(found)
    assert [line[shown.heads.index("commit, if another")] for line in shown.rows[:3]] == ["bbb", "bbb", "–"]


def test_another_machine_s_stays_apart(tmp_path: Path) -> None:
    here, there = report_record(), report_record()
    there["hardware"] = here["hardware"] | {"cpu": "another"}
    places = [written(tmp_path / "here", here), written(tmp_path / "there", there)]
    with pytest.raises(SettingError, match="is of another hardware than"):
        merged(places, tmp_path / "out")
    assert not (tmp_path / "out" / "report.json").exists()
