"""Python's server of forks, from which tests start processes that they kill: a process has one, and whoever asks first
says what it has imported, so that is said here for all."""

from __future__ import annotations

import multiprocessing
import re
from functools import cache
from multiprocessing import forkserver, util
from typing import Any

import pytest

from support import forked
from support.paths import TESTS

IMPORTED = (
    "pytest", "safetensors.torch", "lowmem_bagel.pipeline", "lowmem_bagel.cli.app", "support.batch",
    "support.killed_conversions", "support.warm_codecs",
)  # fmt: skip
FORKED = "forkserver import main; import sys; main(*map(int, sys.argv[1:]), "


@cache
def context() -> Any:
    """Of `multiprocessing`: a process takes milliseconds to start."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([*IMPORTED])
    with pytest.MonkeyPatch.context() as patch:  # what starts children sees `support`, which it imports
        patch.setenv("PYTHONPATH", str(TESTS))
        patch.setattr(util, "spawnv_passfds", _started)
        forkserver.ensure_running()
    return found


def _started(path: bytes, command: list[str], fds: list[int], start: Any = util.spawnv_passfds) -> int:
    """The server as a fork of this process, where one waits for a program; it finds its numbers in its arguments."""
    program, is_server = re.subn(r"forkserver import main; main\(\d+, \d+, ", FORKED, command[-1])
    spare = forked.free_spare() if is_server else None
    return int(start(path, command, fds) if spare is None else spare.begin(program, fds))
