"""The page on older cards shows the committed record, and the record holds what it rests on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lowmem_bagel.benchmarks.predictions import (
    BEGIN,
    END,
    FORMATS,
    OLDER,
    STAND_IN,
    STAND_IN_BEGIN,
    STAND_IN_END,
    TASKS,
    filled,
    predictions,
    read,
    stand_in_table,
    table,
)

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "predictions_older_cards.json"
PAGE = ROOT / "docs" / "older-gpus.md"


def measured() -> list[dict[str, Any]]:
    return read(RECORD.parent / STAND_IN)


def test_the_page_shows_the_record() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, read(RECORD), measured()) == page
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


def test_only_the_tables_are_replaced() -> None:
    rows, found = read(RECORD), measured()
    page = f"a {BEGIN} old {END} b {STAND_IN_BEGIN} old {STAND_IN_END} c"
    wanted = f"a {BEGIN}\n{table(rows)}\n{END} b {STAND_IN_BEGIN}\n{stand_in_table(found)}\n{STAND_IN_END} c"
    assert filled(page, rows, found) == wanted
    with pytest.raises(ValueError, match="unpack"):
        filled("no markers", rows, found)


def test_the_stand_in_had_the_newer_abilities_switched_off() -> None:
    off = {"bf16", "flash-attn", "cudnn", "flash", "triton"}
    record = json.loads((RECORD.parent / STAND_IN).read_text(encoding="utf-8"))
    assert set(record["switched_off"]) == off
    for row in record["results"]:
        assert "float32" in row["reasons"]["dtype"]
        assert row["reasons"]["vit attention" if ":ask" in row["row"] else "vae attention"] == "efficient"
