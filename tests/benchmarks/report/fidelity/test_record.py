"""What the committed record says, held to what is promised of it."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from lowmem_bagel.benchmarks.report.fidelity.metrics import psnr, ssim
from lowmem_bagel.benchmarks.report.reading import report_of
from PIL import Image
from support.paths import RESULTS

PATH = RESULTS / "fidelity_demo.json"
RECORD = json.loads(PATH.read_text(encoding="utf-8"))["results"]
ROWS: dict[str, Any] = {row["name"]: row for row in RECORD["variants"]}


def test_lossless_is_exact_and_nothing_else_is() -> None:
    assert {name for name, row in ROWS.items() if row["exact"]} == {"bf16", "dfloat11"}
    for name in ("bf16", "dfloat11"):
        assert ROWS[name]["text"]["kl_nats"]["max"] == 0 == max(ROWS[name]["velocity"]["per_step"])
        assert ROWS[name]["pictures"]["psnr_db"]["worst"] == "inf"


def test_every_row_was_measured_and_answers_as_the_source_does() -> None:
    assert {row["state"] for row in ROWS.values()} == {"measured"}
    assert {row["text"]["equal_answers"] for row in ROWS.values()} == {1.0}
    assert {row["kind"] for row in ROWS.values()} == {"format", "step cache", "adapter", "arithmetic"}


def test_float16_arithmetic_is_at_least_ten_times_nearer_than_bfloat16() -> None:
    near, far = (ROWS[name]["velocity"] for name in ("float16", "bfloat16"))
    assert all(10 * near[figure] < far[figure] for figure in ("first_plain", "first_guided"))


def test_a_report_reads_it() -> None:
    row = {"row": "int8", "format": "int8", "limit_gb": 0, "task": "generate", "state": "failed", "why": "not asked"}
    whole = {**json.loads(PATH.read_text(encoding="utf-8")), "benchmark": "report"}
    read = report_of({**whole, "results": {"rows": [row], "fidelity": RECORD}}, PATH).fidelity
    assert [found.name for found in read] == [*ROWS]
    by_name = {found.name: found for found in read}
    assert by_name["dfloat11"].exact and by_name["dfloat11"].psnr_worst == math.inf
    assert by_name["int8"].psnr_worst == ROWS["int8"]["pictures"]["psnr_db"]["worst"]
    assert by_name["nf4"].accuracy["edits"] == "5 of 6"


@pytest.mark.parametrize("name", ROWS)
def test_the_pictures_are_there_and_are_those_measured(name: str) -> None:
    """No picture is further from the source's than the worst that was measured."""
    figures = ROWS[name]["pictures"]
    assert len(figures["files"]) == len(RECORD["source"]["files"]) == 3
    for own, source in zip(figures["files"], RECORD["source"]["files"], strict=True):
        pair = [np.asarray(Image.open(RESULTS / file)) for file in (own, source)]
        assert psnr(*pair) >= float(figures["psnr_db"]["worst"]) - 1e-9
        assert ssim(*pair) >= figures["ssim"]["worst"] - 1e-9
