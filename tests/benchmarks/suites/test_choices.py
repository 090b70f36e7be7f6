"""The record of what `choose` says for common cards, and the pages that show it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from lowmem_bagel.benchmarks.pages.choosing import _rows
from lowmem_bagel.benchmarks.record import read_records
from lowmem_bagel.benchmarks.suites import choices
from lowmem_bagel.benchmarks.suites.choices import REQUESTS
from lowmem_bagel.benchmarks.suites.predictions import COMMON
from support.command import Ran
from support.paths import RESULTS, ROOT

RECORDS = read_records(RESULTS)
RECORD = RECORDS["predictions_choices"]


def test_a_record_is_written_as_the_committed_one(
    tmp_path: Path, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "COMMON", ("T4",))
    assert cli("bench", "choices", "--out", tmp_path / "new.json").code == 0
    new = json.loads((tmp_path / "new.json").read_text())
    assert new["settings"] == RECORD["settings"], "the rule or the formats changed: lowmem-bagel bench choices"
    before = [row for row in RECORD["results"] if row["card"] == "T4"]
    assert len(new["results"]) == len(before) == len(REQUESTS)
    for row, old in zip(new["results"], before, strict=True):
        assert row.keys() == old.keys() and row["recommended"].keys() == old["recommended"].keys()
        assert (row["task"], row["size"]) == (old["task"], old["size"])
        assert row["commands"][-1].startswith(f"lowmem-bagel {row['task']} ")


def test_pages_have_a_line_for_every_card() -> None:
    assert [row["card"] for row in _rows(RECORDS)] == list(COMMON)
    for page in ("README.md", "docs/choosing.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert all(f"\n| {card} | " in text for card in COMMON)
    assert all(row["lossless"]["lossless"] for row in RECORD["results"])
