"""The page of performance and the README's figures are what the committed records give, and say what was measured."""

from __future__ import annotations

import json
import re
from copy import deepcopy

import pytest
from lowmem_bagel.benchmarks.pages.performance import (
    ANSWERS,
    BEGIN,
    CACHED,
    DEMO_BEGIN,
    DEMO_END,
    END,
    LIBRARIES,
    PICTURES,
    Records,
    demo_summary,
    performance_page,
    summary,
    with_summary,
)
from lowmem_bagel.benchmarks.rows import Row
from support.paths import ROOT

RECORDS = Records.read(ROOT / "benchmarks" / "results")
PAGE, README = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/performance.md", "README.md"))
REMEDY = "run python -m lowmem_bagel.benchmarks.pages.performance"


def test_the_page_is_what_the_records_give() -> None:
    assert performance_page(RECORDS) == PAGE, REMEDY


def test_the_readmes_figures_are_the_records() -> None:
    assert with_summary(README, RECORDS) == README, REMEDY
    assert summary(RECORDS) in README
    with pytest.raises(ValueError, match="unpack"):
        with_summary("no markers", RECORDS)
    page = f"a {BEGIN} old {END} b {DEMO_BEGIN}{DEMO_END} c"
    filled = f"a {BEGIN}\n{summary(RECORDS)}\n{END} b {DEMO_BEGIN}\n{demo_summary(RECORDS)}\n{DEMO_END} c"
    assert with_summary(page, RECORDS) == filled


def test_the_embedded_models_figures_are_its_records() -> None:
    changed = deepcopy(RECORDS)
    changed.demo["results"]["answers"]["right"] -= 1
    assert demo_summary(changed) != demo_summary(RECORDS)
    for task, share in (("answers", 0.98), ("drawings", 0.93), ("edits", 0.93)):  # what it was trained for
        assert RECORDS.demo["results"][task]["right"] >= share * RECORDS.demo["results"][task]["total"]


@pytest.mark.parametrize("name", [*PICTURES, *ANSWERS])
def test_a_figure_that_changes_changes_the_page(name: str) -> None:
    """Every row's seconds or tokens, and every memory figure, come from its record."""
    for key in ("seconds", "tokens_per_second", "peak_bytes", "reserved_bytes", "device_used_bytes"):
        changed = deepcopy(RECORDS)
        figures = changed.row(name)
        if key == "seconds" and name in PICTURES:
            figures["seconds"]["median"] *= 2
        elif key != "seconds" and key in figures:
            figures[key] *= 2
        else:
            continue
        before, after = PAGE.splitlines(), performance_page(changed).splitlines()
        assert [line for line in after if line not in before], key


def test_what_upstream_took_stands_beside_ours_under_its_conditions() -> None:
    words = " ".join(PAGE.split())
    assert "one H200 with torch 2.11, random weights of the true shape" in RECORDS.upstream["conditions"]
    assert RECORDS.upstream["conditions"].removeprefix("m") in words
    for other in RECORDS.upstream["results"]:
        assert other["beside"] in PICTURES
        assert f"| {other['name']} |" in PAGE
        assert f"{other['seconds']:g} ({other['by']})" in PAGE


def test_limits_were_kept_and_pictures_are_the_residents() -> None:
    """What the page says of its limited rows."""
    limited = [name for name in PICTURES if Row.parse(name).limit_gb]
    assert len(limited) > 4
    for name in limited:
        figures = RECORDS.row(name)
        assert figures["device_used_bytes"] <= Row.parse(name).limit_gb * 1e9, name
        assert figures["equals_reference"] is True, name


def test_step_caches_are_shown_on_random_weights_and_on_pictures_of_something() -> None:
    section = PAGE.split("## Step caches")[1].split("\n## ")[0]
    assert set(RECORDS.demo_caches["results"]) == {"source", "taylorseer", "first-block"}
    for name in ("taylorseer", "first-block"):
        changed = deepcopy(RECORDS)
        changed.demo_caches["results"][name]["tasks"]["drawings"]["median_distance"] *= 2
        assert performance_page(changed) != PAGE
    for name in CACHED:
        figures = RECORDS.row(name)
        assert f"| {figures['evaluations_computed']} of {figures['evaluations']} |" in section


def test_repetitions_and_their_spread_are_said() -> None:
    words = " ".join(PAGE.split())
    assert "the median of at most 2 after a short warm-up" in words
    more = deepcopy(RECORDS)
    more.engine["settings"]["repeat"] = 3
    more.engine["results"][0]["seconds"]["max"] *= 1.5
    changed = " ".join(performance_page(more).split())
    assert "at most 3 after" in changed
    found = re.search(r"none of ours spreads over more than (\S+)%", changed)
    assert found
    assert float(found[1]) > 49


def test_a_star_marks_the_second_run() -> None:
    first = {figures["row"] for figures in RECORDS.engine["results"]}
    starred = [name for name in (*PICTURES, *ANSWERS) if name not in first]
    tables = PAGE.split("## Pictures")[1].split("## The libraries' kernels")[0].split("## Step caches")
    assert (tables[0] + tables[1].split("## Text")[1]).count(r" \* |") == len(starred) > 5
    assert all(RECORDS.row(name) in RECORDS.limits["results"] for name in starred)
    assert RECORDS.row("int8") in RECORDS.engine["results"]
    for run in RECORDS.runs:
        assert f"commit {run['commit']}" in " ".join(PAGE.split())


def test_the_libraries_stand_beside_our_kernels_of_the_same_run() -> None:
    section = PAGE.split("## The libraries' kernels on our files")[1].split("\n## ")[0]
    for run in RECORDS.runs:
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
    backends = {Row.parse(figures["row"]).backend for run in RECORDS.runs for figures in run["results"]}
    assert backends >= set(LIBRARIES)


def test_the_records_are_of_one_kind_of_machine() -> None:
    for record in (RECORDS.floor, RECORDS.limits):
        assert record["versions"] == RECORDS.engine["versions"]
        for part in ("gpu", "cpu", "gpu_bytes"):
            assert record["hardware"][part] == RECORDS.engine["hardware"][part], part
    assert (
        RECORDS.engine["settings"]["size"] == RECORDS.floor["settings"]["size"] == RECORDS.upstream["settings"]["size"]
    )


def test_the_commands_name_every_row() -> None:
    block = PAGE.split("## Measuring again")[1]
    for run in RECORDS.runs:
        assert {figures["row"] for figures in run["results"]} <= set(re.split(r"\s+", block))
    for name in ("engine_h200", "engine_limits_h200", "floor_h200"):
        assert f"benchmarks/results/{name}.json" in block
        assert json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["results"]
