"""The comparison of INT8's tiles, with a clock that is made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from lowmem_bagel.benchmarks.cases import Setup
from lowmem_bagel.benchmarks.shapes import TINY
from lowmem_bagel.benchmarks.suites.int8_tiles import layer_rows, linear_rows
from lowmem_bagel.benchmarks.timing import Call

from lowmem_bagel.formats.int8.tiles import AMPERE, Shape, Tile, Tiles


def test_linears_are_timed_by_either_choice_and_layers_are_their_sums() -> None:
    small = Setup(torch.device("cpu"), TINY.decoder, 100, check_only=False)
    best = AMPERE[1]
    estimated = Tiles(28, False)
    measured = replace(estimated, measured={Shape(100, n, k): {best: 1.0} for n, k in small.linears.values()})
    assert estimated.choose(100, *small.linears["qkv"]) != best

    def timer(calls: Sequence[Call]) -> float:
        tiles = {call.args[1] for call in calls}  # type: ignore[attr-defined]
        (tile,) = tiles
        assert isinstance(tile, Tile)
        return 2.0 if tile == best else 3.0

    rows: list[dict[str, Any]] = list(linear_rows(small, estimated, measured, timer))
    assert [row["linear"] for row in rows] == ["qkv", "o", "gate_up", "down"]
    assert {row["measured_tile"] for row in rows} == {best.name}
    (layer,) = layer_rows(rows, 28)
    assert layer["measured_seconds"] == 28 * 4 * 2.0
    assert layer["estimated_seconds"] == pytest.approx(28 * sum(row["estimated_seconds"] for row in rows))
    assert layer["estimated_seconds"] > layer["measured_seconds"]
