"""The page on older cards shows the committed record, and the record holds what it rests on."""

from __future__ import annotations

import json

import pytest
from lowmem_bagel.benchmarks.suites.predictions import (
    BEGIN,
    END,
    FORMATS,
    OLDER,
    STAND_IN_BEGIN,
    STAND_IN_END,
    TASKS,
    TRITON_BEGIN,
    TRITON_END,
    Measured,
    filled,
    predictions,
    read,
    stand_in_table,
    table,
    triton_table,
)
from support.paths import ROOT

RECORD = ROOT / "benchmarks" / "results" / "predictions_older_cards.json"
PAGE = ROOT / "docs" / "older-gpus.md"


def measured() -> Measured:
    return Measured.read(RECORD.parent)


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
    page = f"a {BEGIN} old {END} b {STAND_IN_BEGIN} old {STAND_IN_END} c {TRITON_BEGIN} old {TRITON_END}"
    wanted = (
        f"a {BEGIN}\n{table(rows)}\n{END} b {STAND_IN_BEGIN}\n{stand_in_table(found)}\n{STAND_IN_END} c "
        f"{TRITON_BEGIN}\n{triton_table(found)}\n{TRITON_END}"
    )
    assert filled(page, rows, found) == wanted
    with pytest.raises(ValueError, match="unpack"):
        filled("no markers", rows, found)


TURING = {"bf16", "flash-attn", "cudnn", "flash", "triton"}


@pytest.mark.parametrize(
    ("name", "off"),
    [
        ("as_turing", TURING),
        ("as_turing_plain", TURING | {"nvrtc"}),
        ("without_triton", {"triton"}),
        ("without_triton_plain", {"triton", "nvrtc"}),
    ],
)
def test_what_was_measured_had_abilities_switched_off(name: str, off: set[str]) -> None:
    record = json.loads((RECORD.parent / f"engine_h200_{name}.json").read_text(encoding="utf-8"))
    assert set(record["switched_off"]) == off
    for row in record["results"]:
        assert ("float32" in row["reasons"]["dtype"]) == ("bf16" in off)
        assert ("token steps" in row["reasons"]) == ("nvrtc" in off), "the reason why our kernels did not run"
        if "bf16" in off:
            assert row["reasons"]["vit attention" if ":ask" in row["row"] else "vae attention"] == "efficient"


def test_our_kernels_are_faster_than_pytorchs_operations() -> None:
    found = measured()
    for ours, plain in (
        (found.stand_in, found.stand_in_plain),
        (found.without_triton, found.without_triton_plain),
    ):
        assert plain
        for name, row in plain.items():
            assert ours[name]["seconds"]["median"] < 0.8 * row["seconds"]["median"]
