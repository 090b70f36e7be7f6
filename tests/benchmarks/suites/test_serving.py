"""`bench serving`, on the demo checkpoint without a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from lowmem_bagel.benchmarks.suites import serving
from support.command import Ran

from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.errors import SettingError


def test_a_run_records_both_ways_many_clients_and_memory(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    out = tmp_path / "serving.json"
    small = ("--size", 32, "--num-timesteps", 3, "--clients", "1,3", "--pictures", 2, "--repeat", 1, "--answers", 3)
    assert cli("bench", "serving", FOLDER, *small, "--device", "cpu", "--out", out).code == 0
    (found,) = json.loads(out.read_text())["results"]
    assert len(found["pipeline_seconds"]) == len(found["api_seconds"]) == 1
    assert {number: len(of["seconds"]) for number, of in found["clients"].items()} == {"1": 2, "3": 3}
    assert all(of["pictures_a_minute"] > 0 for of in found["clients"].values())
    assert found["rss_bytes"]["after"] > 1e7
    assert found["api_pieces"].keys() == {"asking", "queue", "drawing", "encoding", "transfer", "reading"}
    assert min(found["api_pieces"].values()) >= 0
    assert sum(found["api_pieces"].values()) == pytest.approx(found["api_seconds"][0])


def test_a_run_that_is_cut_off_leaves_what_it_has(
    tmp_path: Path, cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(_: object, clients: int, __: int) -> dict[str, object]:
        if clients == 3:
            raise SettingError("cut off")
        return {"pictures_a_minute": 1.0, "seconds": [60.0]}

    monkeypatch.setattr(serving, "_together", cut_off)
    out = tmp_path / "serving.json"
    small = ("--size", 32, "--num-timesteps", 3, "--clients", "1,3", "--repeat", 1, "--device", "cpu", "--out", out)
    assert cli("bench", "serving", FOLDER, *small).code != 0
    (found,) = json.loads(out.read_text())["results"]
    assert len(found["pipeline_seconds"]) == 1 and found["clients"].keys() == {"1"}
