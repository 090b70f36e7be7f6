"""Python's server of forks, from which tests start processes that they kill: a process has one, and whoever asks first
says what it has imported, so that is said here for all."""

from __future__ import annotations

import multiprocessing
from functools import cache
from multiprocessing import forkserver
from typing import Any

import pytest

from support.paths import TESTS

IMPORTED = (
    "pytest", "safetensors.torch", "lowmem_bagel.pipeline", "lowmem_bagel.cli.app", "support.batch",
    "support.killed_conversions", "support.warm_codecs",
)  # fmt: skip


@cache
def context() -> Any:
    """Of `multiprocessing`: a process takes milliseconds to start."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([*IMPORTED])
    with pytest.MonkeyPatch.context() as patch:  # what starts children sees `support`, which it imports
        patch.setenv("PYTHONPATH", str(TESTS))
        forkserver.ensure_running()
    return found
