"""`bench startup --work`: where random weights are written for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lowmem_bagel.benchmarks import written
from lowmem_bagel.benchmarks.report import startup as measuring
from lowmem_bagel.benchmarks.suites.startup import startup_command

from lowmem_bagel.errors import OutputError


def run(work: Path, out: Path) -> None:
    startup_command(None, "tiny", "int8", None, 64, 2, 1, work, out)


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
