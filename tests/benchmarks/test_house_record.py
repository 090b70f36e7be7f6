"""The engine before and after the tree was moved: no row more than 2% slower or larger."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean
from typing import Any

import pytest
from support.paths import RESULTS

from lowmem_bagel.checkpoint.config import read_json

RECORD = read_json(RESULTS / "engine_house_h200.json")
ROWS = ["int8", "source", "dfloat11", "nf4", "source:step_cache=taylorseer", "source::edit"]
TEXTS = ["int8::ask", "source::ask", "dfloat11::ask", "nf4::ask"]


def of(side: str, row: str, value: str) -> float:
    found: dict[str, list[float]] = defaultdict(list)
    for run in RECORD["runs"]:
        result: dict[str, Any] = run["results"].get(row, {})
        if run["of"] == side and value in result:
            found[value].append(result[value]["median"] if value == "seconds" else result[value])
    return mean(found[value])


@pytest.mark.parametrize("row", ROWS)
def test_no_picture_takes_2_percent_longer(row: str) -> None:
    assert of("after", row, "seconds") < 1.02 * of("before", row, "seconds")


@pytest.mark.parametrize("row", TEXTS)
def test_no_text_is_more_than_2_percent_slower(row: str) -> None:
    assert of("before", row, "tokens_per_second") < 1.02 * of("after", row, "tokens_per_second")


@pytest.mark.parametrize("row", ROWS + TEXTS)
def test_none_is_larger(row: str) -> None:
    assert of("after", row, "peak_bytes") < 1.001 * of("before", row, "peak_bytes")
