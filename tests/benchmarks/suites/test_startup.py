"""`bench startup --work`: where random weights are written for a while."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lowmem_bagel.benchmarks import written
from lowmem_bagel.benchmarks.report import startup as measuring
from lowmem_bagel.benchmarks.report import tables
from lowmem_bagel.benchmarks.report.reading import report_of
from lowmem_bagel.benchmarks.suites.startup import startup_command
from support.command import Ran

from lowmem_bagel.errors import OutputError


def run(work: Path, out: Path) -> None:
    startup_command(None, "tiny", "int8", None, 64, 2, 1, work, out=out)


def test_a_working_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[Path] = []

    def measure(folder: Path, flags: object, repeat: int) -> dict[str, Any]:
        measured.append(folder)
        return {}

    monkeypatch.setattr(written, "write_folder", lambda format, shape, out, device: out)
    monkeypatch.setattr(measuring, "measure_startup", measure)
    monkeypatch.setattr(measuring, "lines", lambda format, measured: [])
    work = tmp_path / "not" / "yet"
    run(work, tmp_path / "startup.json")
    assert [folder.parents[1] for folder in measured] == [work]
    assert list(work.iterdir()) == [], "the weights are gone afterwards"


def test_a_working_folder_that_cannot_be_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write to .*file.*; choose another folder with --work$"):
        run(tmp_path / "file" / "work", tmp_path / "startup.json")
    assert not (tmp_path / "startup.json").exists()


def test_runs_are_put_together_and_rows_say_of_which_they_are(cli: Callable[..., Ran], tmp_path: Path) -> None:
    def row(format: str, seconds: float) -> dict[str, Any]:
        phases = {"weights": seconds, "whole": seconds}
        return {"format": format, "limit_gb": None, "cold": phases, "warm": phases, "cold_first_step": seconds}

    head = {"benchmark": "startup", "command": "bench startup", "versions": {}, "settings": {"repeat": 1}}
    runs = {
        "one": ("a", 5, [row("int8", 1.0), row("nf4", 2.0)]),
        "two": ("b", 16, [row("nf4", 3.0)]),
        "other": ("b", 16, []),
    }
    for name, (commit, cores, rows) in runs.items():
        of = {"commit": commit, "hardware": {"cores": cores, "gpu": "other" if name == "other" else "H200"}}
        (tmp_path / f"{name}.json").write_text(json.dumps({**head, **of, "results": {"rows": rows}}))
    out = tmp_path / "out.json"

    def merge(*names: str) -> Ran:
        options = [word for name in names for word in ("--merge", str(tmp_path / f"{name}.json"))]
        return cli("bench", "startup", *options, "--out", str(out))

    ran = merge("one", "other")
    assert ran.code and "other.json is of another card than" in ran.err and not out.exists()
    (tmp_path / "broken.json").write_text('{"benchmark": "startup"}')
    ran = merge("one", "broken")
    assert ran.code and "broken.json is broken: it lacks 'versions'" in ran.err and not out.exists()
    assert merge("one", "two").code == 0
    record = json.loads(out.read_text())
    assert record["commands"] == ["bench startup"] * 2
    found = [(row["format"], row["cold_first_step"], row["commit"], row["cores"]) for row in record["results"]["rows"]]
    assert found == [("int8", 1.0, "a", 5), ("nf4", 3.0, "b", 16)]
    report = report_of(
        {**record, "benchmark": "report", "results": {"rows": [{"format": "int8"}], "startup": record["results"]}}, out
    )
    assert [cells[0] for cells in tables.startup(report).rows] == ["INT8 (5 cores, a)", "NF4 (16 cores, b)"]
