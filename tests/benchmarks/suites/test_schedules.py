"""`bench schedules` in parts: each schedule once, and one record of them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from lowmem_bagel.benchmarks.demo import search
from lowmem_bagel.benchmarks.demo.schedules import ordered
from lowmem_bagel.benchmarks.suites.schedules import _part
from support.command import Ran

SEARCH = ("bench", "schedules", "--tasks", "drawings", "--scenes", "2", "--lot", "2", "--device", "cpu")


def test_parts_are_all_schedules_once() -> None:
    whole = ordered(True, 2026)
    parts = [whole[first - 1 :: every] for first, every in map(_part, ("1/3", "2/3", "3/3"))]
    assert sorted(str(one) for part in parts for one in part) == sorted(map(str, whole))


def test_two_parts_and_one_record_of_both(
    cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pictures in few steps: that a search's rows are those of its schedules is held by demo/test_schedules.py."""
    monkeypatch.setattr(search, "draw", partial(search.draw, timesteps=4))
    paths = [tmp_path / f"{part}.json" for part in (1, 2)]
    for part, path in enumerate(paths, 1):
        ran = cli(*SEARCH, "--minutes", "1", "--part", f"{part}/1690", "--out", str(path))
        assert ran.code == 0, ran.err
    out = tmp_path / "all.json"
    assert cli("bench", "schedules", "--merge", str(paths[0]), "--merge", str(paths[1]), "--out", str(out)).code == 0
    each = [json.loads(path.read_text())["results"]["drawings"] for path in paths]
    merged = json.loads(out.read_text())
    rows = [row for families in each for found in families.values() for row in found]
    assert len(rows) > 3 and len({row[0] for row in rows}) == len(rows)
    assert sorted(row for found in merged["results"]["drawings"].values() for row in found) == sorted(rows)
    assert len(merged["commands"]) == 2 and merged["settings"] == {"scenes": 2, "seed": 2026, "device": "cpu"}


def test_what_does_not_belong_together_is_refused(cli: Callable[..., Ran], tmp_path: Path) -> None:
    head = {"benchmark": "schedules", "command": "", "commit": "a", "versions": {}, "hardware": {}, "results": {}}
    settings = {"scenes": 2, "seed": 1, "device": "cpu"}
    for name, record in {
        "one": head | {"settings": settings},
        "other": head | {"settings": settings | {"scenes": 3}},
        "engine": head | {"benchmark": "engine"},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    for name, why in {
        "other": "other.json is of another scenes than", "engine": "engine.json is no record of bench schedules",
        "missing": "cannot read",
    }.items():  # fmt: skip
        given = (str(tmp_path / "one.json"), "--merge", str(tmp_path / f"{name}.json"))
        ran = cli("bench", "schedules", "--merge", *given, "--out", str(tmp_path / "out.json"))
        assert ran.code and why in ran.err and not (tmp_path / "out.json").exists()
    ran = cli("bench", "schedules", "--part", "3/2")
    assert ran.code and "part must be two numbers such as 2/6, not '3/2'" in ran.err
