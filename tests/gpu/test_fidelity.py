"""On a card: what is lossless is exactly zero there too, and float16 arithmetic works where bfloat16 is native."""

from __future__ import annotations

from typing import Any

import pytest
from lowmem_bagel.benchmarks.report.fidelity.material import Material, Request
from lowmem_bagel.benchmarks.report.fidelity.measure import Terms, Wanted, measure_fidelity
from lowmem_bagel.benchmarks.report.fidelity.observe import Work
from lowmem_bagel.benchmarks.report.fidelity.subjects import RandomWeights

pytestmark = pytest.mark.gpu

MATERIAL = Material({"name": "few"}, (Request("a red circle"),), ("a red circle",), ())
FORMATS = ("dfloat11", "int8", "nf4", "gguf-q8_0")


def measured(dtype: str) -> dict[str, Any]:
    work = Work(MATERIAL, 64, 4, 6, 1, False, 1)
    wanted = Wanted(FORMATS, arithmetic=("float16", "bfloat16"))
    found = measure_fidelity(RandomWeights("tiny", None, "cuda", 0), wanted, Terms("cuda", dtype, work), lambda _: None)
    rows = {row["name"]: row for row in found["variants"]}
    assert {name: row["why"] for name, row in rows.items()} == dict.fromkeys(rows)
    return rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_format_in_either_arithmetic(dtype: str) -> None:
    rows = measured(dtype)
    assert {rows[name]["dtype"] for name in FORMATS} == {dtype}
    errors = {name: row["velocity"]["first_plain"] for name, row in rows.items()}
    assert 0 < 4 * errors["float16"] < errors["bfloat16"] < 0.1, "both beside float32"
    assert errors["dfloat11"] < 1e-3 < errors["gguf-q8_0"] < errors["nf4"] < 0.5
    assert errors["int8"] < errors["nf4"]
    if dtype == "bfloat16":
        assert rows["dfloat11"]["exact"] is True
