"""The page on older cards: the record holds what it rests on, and what was measured had its card's features off."""

from __future__ import annotations

import pytest
from lowmem_bagel.benchmarks.pages.measured import measured
from lowmem_bagel.benchmarks.pages.older_gpus import prediction_table
from lowmem_bagel.benchmarks.record import read_records
from lowmem_bagel.benchmarks.suites.predictions import FORMATS, OLDER
from support.paths import RESULTS, ROOT

from lowmem_bagel.settings import TASKS

RECORDS = read_records(RESULTS)
PREDICTIONS = RECORDS["predictions_older_cards"]


def test_the_record_is_whole_and_says_what_it_assumes() -> None:
    rows, settings = PREDICTIONS["results"], PREDICTIONS["settings"]
    assert len(rows) == len(OLDER) * len(FORMATS) * len(TASKS)
    assert (ROOT / "docs" / "older-gpus.md").read_text(encoding="utf-8").count("\n| T4 |") == len(FORMATS)
    assert set(settings["cards"]) == set(OLDER)
    assert settings["calibration"]["attention_share"]["efficient"] > 0
    for row in rows:
        assert not row["fits"] or "nominal rates measured on an H200" in row["reasons"]["assumptions"]


def test_the_table_says_where_streamed_units_wait() -> None:
    rows = {row["task"]: dict(row) for row in PREDICTIONS["results"][: len(TASKS)]}
    rows["generate"] |= {"waiting": {"pinned": 20, "disk": 8}}
    assert "| 20 pinned + 8 disk |" in prediction_table([rows])
    rows["generate"] |= {"waiting": {}}
    assert prediction_table([rows]).endswith("| none |")
    rows["generate"] = {"card": "T4", "format": "int8", "task": "generate", "fits": False}
    assert prediction_table([rows]).splitlines()[-1].startswith("| T4 | int8 | does not fit | does not fit |")


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
    record = RECORDS[f"engine_h200_{name}"]
    assert set(record["switched_off"]) == off
    for row in record["results"]:
        assert ("float32" in row["reasons"]["dtype"]) == ("bf16" in off)
        assert ("token steps" in row["reasons"]) == ("nvrtc" in off), "the reason why our kernels did not run"
        if "bf16" in off:
            assert row["reasons"]["vit attention" if ":ask" in row["row"] else "vae attention"] == "efficient"


def test_our_kernels_are_faster_than_pytorchs_operations() -> None:
    for name in ("as_turing", "without_triton"):
        ours, plain = (measured(RECORDS, f"engine_h200_{name}{suffix}") for suffix in ("", "_plain"))
        assert plain
        for row, found in plain.items():
            assert ours[row].seconds < 0.8 * found.seconds
