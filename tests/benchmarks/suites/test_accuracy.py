"""What the committed records say of the embedded model in other formats and arithmetic, held to what is promised."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.paths import RESULTS

from lowmem_bagel.planner.fidelity import MOST_POINTS

HALF_A_POINT = 0.5


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]
    return found


def test_fp16_is_as_accurate_as_float32_with_every_attention_backend() -> None:
    covered = set()
    for name in ("accuracy_demo_fp16", "accuracy_demo_fp16_h200"):
        for way, found in results(name).items():
            dtype, _, attention = way.partition(":")
            if way == "source":
                assert found["dtype"] == "float32"
                continue
            assert (found["dtype"], found["attention"]) == (dtype, attention) == ("float16", attention)
            assert set(found["tasks"]) == {"answers", "drawings", "edits"}
            assert all(abs(task["points_above_source"]) <= HALF_A_POINT for task in found["tasks"].values()), way
            covered.add(attention)
    assert covered == {"sdpa", "math", "chunked", "efficient", "flash", "cudnn"}


def test_lossless_is_equal_in_every_picture() -> None:
    found = results("accuracy_demo")["dfloat11"]["tasks"]
    assert all(found[task]["equal_pictures"] == found[task]["total"] for task in ("drawings", "edits"))
    assert not any(task["lost"] or task["gained"] for task in found.values())


def test_attention_of_integers_costs_no_more_than_lossy_weights_may() -> None:
    found = results("accuracy_demo_attention")["float32:int8"]
    assert found["attention"] == "int8"
    assert all(task["points_above_source"] >= -MOST_POINTS for task in found["tasks"].values())
    assert not any(found["tasks"][task]["equal_pictures"] for task in ("drawings", "edits"))


@pytest.mark.parametrize(("format", "points"), [("int8", 1.0), ("nf4", 3.0)])
def test_what_the_lossy_formats_cost(format: str, points: float) -> None:
    found = results("accuracy_demo")[format]["tasks"]
    assert all(task["points_above_source"] >= -points for task in found.values())
