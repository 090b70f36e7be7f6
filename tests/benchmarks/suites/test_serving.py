"""`bench serving`, on the demo checkpoint without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from support.command import Ran

from lowmem_bagel.demo_checkpoint import FOLDER


def test_a_run_records_both_ways_many_clients_and_memory(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    out = tmp_path / "serving.json"
    small = ("--size", 32, "--num-timesteps", 3, "--clients", "1,3", "--pictures", 2, "--repeat", 1, "--answers", 3)
    assert cli("bench", "serving", FOLDER, *small, "--device", "cpu", "--out", out).code == 0
    (found,) = json.loads(out.read_text())["results"]
    assert len(found["pipeline_seconds"]) == len(found["api_seconds"]) == 1
    assert {number: len(of["seconds"]) for number, of in found["clients"].items()} == {"1": 2, "3": 3}
    assert all(of["pictures_a_minute"] > 0 for of in found["clients"].values())
    assert found["rss_bytes"]["after"] > 1e7
