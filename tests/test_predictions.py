"""The page on older cards shows the committed record, and the record holds what it rests on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lowmem_bagel.benchmarks.predictions import BEGIN, END, FORMATS, OLDER, TASKS, predictions, read, table, with_table

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "predictions_older_cards.json"
PAGE = ROOT / "docs" / "older-gpus.md"


def test_the_page_shows_the_record() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page, read(RECORD)) == page
    assert page.count("\n| T4 |") == len(FORMATS)


def test_the_record_is_whole_and_says_what_it_assumes() -> None:
    rows = read(RECORD)
    assert len(rows) == len(OLDER) * len(FORMATS) * len(TASKS)
    settings = json.loads(RECORD.read_text(encoding="utf-8"))["settings"]
    assert set(settings["cards"]) == set(OLDER)
    assert settings["calibration"]["attention_share"]["efficient"] > 0
    for row in rows:
        assert not row["fits"] or "nominal rates measured on an H200" in row["reasons"]["assumptions"]


def test_older_cards_get_fp16_with_what_surrounds_it_in_float32() -> None:
    for row in predictions():
        assert row["fits"], row
        assert (row["dtype"], row["residual_dtype"], row["vae_dtype"]) == ("float16", "float32", "float32")
        assert row["attention"] == "efficient"
        assert row["seconds"] > 0


def test_the_table_says_where_streamed_units_wait() -> None:
    rows = [dict(row) for row in read(RECORD)[: len(TASKS)]]
    rows[0] |= {"waiting": {"pinned": 20, "disk": 8}}
    assert "| 20 pinned + 8 disk |" in table(rows)
    rows[0] |= {"waiting": {}}
    assert table(rows).splitlines()[-1].endswith("| none |")


def test_only_the_table_is_replaced() -> None:
    rows = read(RECORD)
    assert with_table(f"a {BEGIN} old {END} b", rows) == f"a {BEGIN}\n{table(rows)}\n{END} b"
    with pytest.raises(ValueError, match="unpack"):
        with_table("no markers", rows)
