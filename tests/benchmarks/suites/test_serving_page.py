"""`bench serving-page`, on the demo checkpoint with few answers."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

from lowmem_bagel.benchmarks.suites.serving_page import _memory, previews
from support.serving import served

from lowmem_bagel.serve.app import create_app


def test_memory_is_looked_at_ten_times() -> None:
    this: Any = SimpleNamespace(pid=os.getpid())
    with served(create_app) as running:
        found = _memory(this, running.url, 10)
    assert [number for number, _ in found] == [*range(1, 11)]
    assert min(held for _, held in found) > 1e7


def test_previews_are_nearly_the_pictures() -> None:
    found = previews(num_timesteps=8)
    assert 0 < found["error"] < 60 and found["seconds"] > 0
