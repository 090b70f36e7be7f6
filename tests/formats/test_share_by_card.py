"""What a way reaches on cards that kernels of its own were written for."""

from __future__ import annotations

import pytest

from lowmem_bagel.formats.registry import format_spec, formats
from lowmem_bagel.planner.calibration import MEASURED


@pytest.mark.parametrize("major", [7, 8, 9, 10, 12])
def test_every_share_is_a_constant_of_the_calibration(major: int) -> None:
    shares = {way.share_on((major, 0)) for name in formats() for way in format_spec(name).ways}
    assert all(0 < getattr(MEASURED, share) <= 1 for share in shares)


def test_int8_reaches_more_on_hopper() -> None:
    way = next(way for way in format_spec("int8").ways if way.by_triton)
    hopper, ada = (getattr(MEASURED, way.share_on(capability)) for capability in ((9, 0), (8, 9)))
    assert hopper > ada
