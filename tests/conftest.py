"""Light, because the process that hands tests to pytest-xdist's workers waits for what is imported here before they
start, and runs none; what tests share is in `support/fixtures.py`."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
from support import forked


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of them compiles everything
    hands_out = config.getoption("dist", "no") != "no"
    if not hands_out:
        config.pluginmanager.register(importlib.import_module("support.fixtures"), "support.fixtures")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker that has nothing left takes over tests of another: some take a second, and most a millisecond."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_unconfigure() -> None:
    forked.end_all()
