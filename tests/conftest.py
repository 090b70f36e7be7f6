"""Light, because the process that hands tests to pytest-xdist's workers waits for what is imported here before they
start, and runs none; what tests share is in `support/fixtures.py`."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import forked

MEMORY = Path("/dev/shm")
ROOM = 8 << 30
"""Bytes that must be free there: several times what the tests' files take at a time."""


def pytest_configure(config: pytest.Config) -> None:
    if MEMORY.is_dir() and min(shutil.disk_usage(MEMORY).free, _available()) >= ROOM:
        # Conversions wait for a disk, and what they write is looked at once. --basetemp has its way all the same.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of them compiles everything
    hands_out = config.getoption("dist", "no") != "no"
    if not hands_out:
        config.pluginmanager.register(importlib.import_module("support.fixtures"), "support.fixtures")


def _available() -> int:
    """Bytes of memory that nobody needs."""
    found = (line.split() for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvail"))
    return next((int(kilobytes) << 10 for _, kilobytes, _ in found), 0)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker that has nothing left takes over tests of another: some take a second, and most a millisecond."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_unconfigure() -> None:
    forked.end_all()
