"""Meters against a driver's library that is made up, and a /proc that is files."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lowmem_bagel.benchmarks.report.meters import NO_CARD, WHAT, CardMeter, RamMeter, card_meter


class Refusal(Exception):
    pass


class Driver:
    """Of one card "GPU-1", whose energy grows by 5 J a question."""

    NVMLError = Refusal
    NVML_CLOCK_SM = 1

    def __init__(self, processes: list[Any], refuses: tuple[str, ...] = ()) -> None:
        self.processes, self.refuses, self.millijoules = processes, refuses, 0

    def _asked(self, name: str) -> None:
        if name in self.refuses:
            raise Refusal("Not Supported")

    def nvmlInit(self) -> None:
        self._asked("init")

    def nvmlDeviceGetHandleByUUID(self, identity: str) -> str:
        if identity != "GPU-1":
            raise Refusal("Not Found")
        return "card"

    def nvmlDeviceGetTotalEnergyConsumption(self, card: str) -> int:
        self._asked("energy")
        self.millijoules += 5000
        return self.millijoules

    def nvmlDeviceGetMemoryInfo(self, card: str) -> Any:
        return SimpleNamespace(used=7)

    def nvmlDeviceGetClockInfo(self, card: str, of: int) -> int:
        return 1000 + of

    def nvmlDeviceGetPowerManagementLimit(self, card: str) -> int:
        self._asked("limit")
        return 700_000

    def nvmlDeviceGetComputeRunningProcesses(self, card: str) -> list[Any]:
        return self.processes


def process(pid: int, nbytes: int | None) -> Any:
    return SimpleNamespace(pid=pid, usedGpuMemory=nbytes)


def test_a_card_tells_energy_and_memory() -> None:
    meter = CardMeter(Driver([process(1, 3), process(os.getpid(), 4)]), "GPU-1")
    before, after = meter.joules(), meter.joules()
    assert before is not None and after is not None and after - before == 5
    assert (meter.device_bytes(), meter.process_bytes()) == (7, 4)
    assert (meter.clock_mhz(), meter.limit_watts(), meter.why) == (1001, 700, {})


@pytest.mark.parametrize("processes", [[], [process(1, 3)], [process(os.getpid(), None)]])
def test_a_driver_that_does_not_list_the_process_is_said(processes: list[Any]) -> None:
    meter = CardMeter(Driver(processes), "GPU-1")
    assert meter.process_bytes() is None and "containers" in meter.why["process"]


def test_what_a_driver_refuses_is_none_with_why() -> None:
    meter = CardMeter(Driver([], ("energy", "limit")), "GPU-1")
    assert meter.joules() is meter.limit_watts() is None
    assert meter.why == dict.fromkeys(("energy", "limit"), "the driver: Not Supported")
    assert meter.device_bytes() == 7


@pytest.mark.parametrize(("driver", "card"), [(Driver([], ("init",)), "GPU-1"), (Driver([]), "GPU-2")])
def test_without_a_driver_or_the_card_nothing_is_known(driver: Driver, card: str) -> None:
    meter = CardMeter(driver, card)
    assert meter.joules() is meter.device_bytes() is meter.process_bytes() is meter.clock_mhz() is None
    assert meter.why.keys() == set(WHAT)


def test_a_processor_has_no_card() -> None:
    meter = card_meter(torch.device("cpu"))
    assert meter.joules() is meter.clock_mhz() is meter.limit_watts() is None and meter.why["limit"] == NO_CARD


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_peak_of_ram_begins_anew() -> None:
    meter = RamMeter()
    before = torch.ones(100 << 18)
    high = meter.peak()
    del before
    meter.begin()
    if meter.why:
        pytest.skip(meter.why)
    low = meter.peak()
    assert high is not None and low is not None and high - low > 80 << 20
    held = torch.ones(50 << 18)
    peak = meter.peak()
    assert held.numel() and peak is not None and 40 << 20 < peak - low < 70 << 20


def test_where_the_kernel_refuses_the_peak_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "clear_refs").mkdir()
    (tmp_path / "status").write_text("Name: x\nVmHWM:\t 12 kB\nVmRSS:\t 8 kB\n")
    meter = RamMeter(tmp_path)
    assert (meter.peak(), meter.now()) == (12 << 10, 8 << 10)
    meter.begin()
    assert meter.peak() is None and "cannot be begun anew" in meter.why
