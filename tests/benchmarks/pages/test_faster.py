"""docs/faster-pictures.md: how a record's rows become a choice."""

from __future__ import annotations

from typing import Any

import pytest
from lowmem_bagel.benchmarks.demo.schedules import PLAIN
from lowmem_bagel.benchmarks.pages.faster import FEW, MOST, SEARCHES, families, preset, taken
from support.paths import RESULTS

from lowmem_bagel.checkpoint.config import read_json

FOUND = {task: read_json(RESULTS / f"{name}.json") for task, name in SEARCHES.items()}


def record(*rows: tuple[Any, ...], family: str = PLAIN) -> dict[str, Any]:
    return {"results": {task: {family: rows} for task in FEW}}


def test_what_changes_a_scene_is_not_chosen_however_near_its_median_picture() -> None:
    rows = [("a", 24, 24, 0.1, 9.0, 0.1, 0.5), ("b", 20, 20, 0.3, 0.7, 0.3, 9.0), ("c", 25, 25, 0.0, 0.0, 0.0, 0.0)]
    assert preset(record(*rows), "fast", "drawings").words == "b"
    assert preset(record(*rows), "balanced", "drawings").words == "c"


def test_what_is_no_pattern_is_not_chosen() -> None:
    made = record(("a", 24, 24, 0.2, 0.5, 0.1, 0.5))
    made["results"]["drawings"]["DBCache"] = [("d", 10, 5, 0.1, 0.1, 0.1, 0.1)]
    assert preset(made, "fast", "drawings").words == "a"
    shown = families(dict.fromkeys(SEARCHES.values(), made))
    assert "| DBCache | 0.10 (0.10) with 10 |  |" in shown
    assert "| DBCache, first and last layers not counted | 0.10 (0.10) with 5 |  |" in shown


@pytest.mark.parametrize("speed", MOST)
@pytest.mark.parametrize("task", SEARCHES)
def test_a_speed_is_what_one_half_chose_or_what_the_other_half_does_not_find_worse(speed: str, task: str) -> None:
    chosen, used = preset(FOUND[task], speed, task), taken(FOUND[task], speed, task)
    assert used.evaluations <= MOST[speed][task]
    assert used == chosen or used.reported[1] <= chosen.reported[1] or used.reported[0] < chosen.reported[0]
