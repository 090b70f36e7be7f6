"""docs/frames.md: what was planned for frames beside what was measured."""

from __future__ import annotations

import pytest
from lowmem_bagel.benchmarks.pages.frames import held, timed
from lowmem_bagel.benchmarks.pages.measured import Measured
from lowmem_bagel.benchmarks.record import read_records
from support.paths import RESULTS

ROWS = timed(read_records(RESULTS))


def test_frames_are_measured_in_both_formats_both_ways_and_in_12_gb() -> None:
    found = {(one.row.format, one.row.frame_mode, one.row.limit_gb) for one in ROWS}
    assert found == {(f, mode, gb) for f in ("source", "int8") for mode in ("together", "turn") for gb in (0, 12)}


@pytest.mark.parametrize("row", ROWS, ids=lambda one: one.words + one.row.frame_mode)
def test_planner_and_measurement_agree(row: Measured) -> None:
    expected = row.figures["predicted"]
    assert expected["seconds"] == pytest.approx(row.seconds, rel=0.15)
    assert expected["peak_bytes"] == pytest.approx(held(row), rel=0.07)
