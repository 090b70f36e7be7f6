"""The page of performance and the README's figures say what was measured, and under which conditions."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import pytest
from lowmem_bagel.benchmarks.pages.measured import LIBRARIES, RUNS, measured
from lowmem_bagel.benchmarks.pages.performance import ANSWERS, CACHED, PERFORMANCE, PICTURES, demo
from lowmem_bagel.benchmarks.record import read_records
from lowmem_bagel.benchmarks.rows import Row
from support.paths import RESULTS, ROOT

RECORDS = read_records(RESULTS)
ROWS = measured(RECORDS)
ENGINE, LIMITS, THEIRS = (RECORDS[run] for run in RUNS)
UPSTREAM, DEMO, CACHES, FLOOR = (
    RECORDS[name] for name in ("upstream_h200", "accuracy_demo_source", "accuracy_demo_caches", "floor_h200")
)
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def spoilable(*names: str) -> dict[str, Any]:
    """The records, those of these names to be changed."""
    return {**RECORDS, **{name: deepcopy(RECORDS[name]) for name in names}}


def written(records: dict[str, Any]) -> str:
    return PERFORMANCE.text(records, PAGE)


def test_the_embedded_models_figures_are_its_records() -> None:
    changed = spoilable("accuracy_demo_source")
    changed["accuracy_demo_source"]["results"]["answers"]["right"] -= 1
    assert demo(changed) != demo(RECORDS)
    for task, share in (("answers", 0.98), ("drawings", 0.93), ("edits", 0.93)):  # what it was trained for
        assert DEMO["results"][task]["right"] >= share * DEMO["results"][task]["total"]


@pytest.mark.parametrize("name", [*PICTURES, *ANSWERS])
def test_a_figure_that_changes_changes_the_page(name: str) -> None:
    """Every row's seconds or tokens, and every memory figure, come from its record."""
    for key in ("seconds", "tokens_per_second", "peak_bytes", "reserved_bytes", "device_used_bytes"):
        changed = spoilable(*RUNS)
        figures = next(f for run in RUNS for f in changed[run]["results"] if f["row"] == name)
        if key == "seconds" and name in PICTURES:
            figures["seconds"]["median"] *= 2
        elif key != "seconds" and key in figures:
            figures[key] *= 2
        else:
            continue
        before, after = PAGE.splitlines(), written(changed).splitlines()
        assert [line for line in after if line not in before], key


def test_what_upstream_took_stands_beside_ours_under_its_conditions() -> None:
    words = " ".join(PAGE.split())
    assert "one H200 with torch 2.11, random weights of the true shape" in UPSTREAM["conditions"]
    assert UPSTREAM["conditions"].removeprefix("m") in words
    for other in UPSTREAM["results"]:
        assert other["beside"] in PICTURES
        assert f"| {other['name']} |" in PAGE
        assert f"{other['seconds']:g} ({other['by']})" in PAGE


def test_limits_were_kept_and_pictures_are_the_residents() -> None:
    """What the page says of its limited rows."""
    limited = [name for name in PICTURES if Row.parse(name).limit_gb]
    assert len(limited) > 4
    for name in limited:
        figures = ROWS[name].figures
        assert figures["device_used_bytes"] <= Row.parse(name).limit_gb * 1e9, name
        assert figures["equals_reference"] is True, name


def test_step_caches_are_shown_on_random_weights_and_on_pictures_of_something() -> None:
    section = PAGE.split("## Step caches")[1].split("\n## ")[0]
    assert set(CACHES["results"]) == {"source", "taylorseer", "first-block"}
    for name in ("taylorseer", "first-block"):
        changed = spoilable("accuracy_demo_caches")
        changed["accuracy_demo_caches"]["results"][name]["tasks"]["drawings"]["median_distance"] *= 2
        assert written(changed) != PAGE
    for name in CACHED:
        figures = ROWS[name].figures
        assert f"| {figures['evaluations_computed']} of {figures['evaluations']} |" in section


def test_repetitions_and_their_spread_are_said() -> None:
    words = " ".join(PAGE.split())
    assert "the median of at most 2 after a short warm-up" in words
    more = spoilable(RUNS[0])
    more[RUNS[0]]["settings"]["repeat"] = 3
    more[RUNS[0]]["results"][0]["seconds"]["max"] *= 1.5
    changed = " ".join(written(more).split())
    assert "at most 3 after" in changed
    found = re.search(r"none of ours spreads over more than (\S+)%", changed)
    assert found
    assert float(found[1]) > 49


def test_a_star_marks_the_second_run() -> None:
    first = {figures["row"] for figures in ENGINE["results"]}
    starred = [name for name in (*PICTURES, *ANSWERS) if name not in first]
    tables = PAGE.split("## Pictures")[1].split("## The libraries' kernels")[0].split("## Step caches")
    assert (tables[0] + tables[1].split("## Text")[1]).count(r" \* |") == len(starred) > 5
    assert all(ROWS[name].figures in LIMITS["results"] for name in starred)
    assert ROWS["int8"].figures in ENGINE["results"]
    for run in (ENGINE, LIMITS, THEIRS):
        assert f"commit {run['commit']}" in " ".join(PAGE.split())


def test_the_libraries_stand_beside_our_kernels_of_the_same_run() -> None:
    section = PAGE.split("## The libraries' kernels on our files")[1].split("\n## ")[0]
    for run in (ENGINE, THEIRS):
        rows = {figures["row"]: figures for figures in run["results"]}
        theirs = [row for row in map(Row.parse, rows) if row.backend in LIBRARIES]
        assert theirs
        for row in theirs:
            figures = rows[f"{row.format}{'::ask' if row.task == 'ask' else ''}:backend={row.backend}"]
            if row.task == "ask":
                assert f"| {figures['tokens_per_second']:.3g}" in section
                continue
            for spread in (figures["seconds"], rows[row.format]["seconds"]):
                assert f"| {spread['min']:.2f} to {spread['max']:.2f} |" in section
                assert spread["median"] >= rows[row.format]["seconds"]["median"]
    backends = {Row.parse(figures["row"]).backend for run in (ENGINE, THEIRS) for figures in run["results"]}
    assert backends >= set(LIBRARIES)


def test_the_records_are_of_one_kind_of_machine() -> None:
    for record in (FLOOR, LIMITS, THEIRS):
        assert record["versions"] == ENGINE["versions"]
        for part in ("gpu", "cpu", "gpu_bytes"):
            assert record["hardware"][part] == ENGINE["hardware"][part], part
    assert ENGINE["settings"]["size"] == FLOOR["settings"]["size"] == UPSTREAM["settings"]["size"]


def test_the_commands_name_every_row() -> None:
    block = PAGE.split("## Measuring again")[1]
    for run in (ENGINE, LIMITS, THEIRS):
        assert {figures["row"] for figures in run["results"]} <= set(re.split(r"\s+", block))
    for name in (*RUNS, "floor_h200"):
        assert f"benchmarks/results/{name}.json" in block
