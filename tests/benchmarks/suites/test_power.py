"""`bench power`: the same operations by several libraries, and clocks that are sampled while work lasts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowmem_bagel.benchmarks.cases import Setup
from lowmem_bagel.benchmarks.shapes import TINY
from lowmem_bagel.benchmarks.suites import power
from support.command import Ran

SMALL = Setup(torch.device("cpu"), TINY.decoder, 32, check_only=True)


class Slowing:
    """A card that lowers its clock at every look."""

    def __init__(self) -> None:
        self.mhz = 2000

    def clock_mhz(self) -> int:
        self.mhz -= 10
        return self.mhz


def test_a_product_is_compared_with_the_libraries_at_its_own_shape() -> None:
    found = list(power.products(SMALL))
    names = [one.name for one in found]
    for linear, (n, k) in list(SMALL.linears.items())[2:]:
        ours = [one for one in found if one.name.endswith(linear)]
        assert {one.operations for one in ours} == {2 * 32 * n * k}
        assert [one.name for one in ours] == [f"{way} {linear}" for way in ("int8", "bf16", "_scaled_mm fp8")]
        assert ours[1].calls[0]().shape == (32, n)
    assert len(set(names)) == len(names)


def test_clocks_are_sampled_while_work_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(power, "SAMPLED_EVERY", 0.001)
    card = Slowing()
    with power._clocks(card) as clocks:  # type: ignore[arg-type]
        time.sleep(0.02)
    assert clocks[0] == 1990 and clocks == sorted(clocks, reverse=True)
    seen = len(clocks)
    time.sleep(0.005)
    assert len(clocks) == seen


def test_a_line_has_energy_where_it_is_known() -> None:
    found = {"kernel": "int8 gate_up", "operations": 2e12, "short_seconds": 1e-3, "seconds": 2e-3}
    assert power.line({**found, "joules": 1.4, "mhz": 1815}).endswith("1000 TOP/s, 1400 mJ, 1815 MHz")
    assert power.line({**found, "joules": None, "mhz": None}).endswith("1000 TOP/s")


def test_without_a_card_it_is_refused(cli: Callable[..., Ran], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "there is none" in cli("bench", "power", "--out", tmp_path / "power.json").error
