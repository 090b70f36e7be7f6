"""The page of performance and the README's figures are what the committed records give, and say what was measured."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
from lowmem_bagel.benchmarks.engine_rows import Row
from lowmem_bagel.benchmarks.tables import (
    ANSWERS,
    BEGIN,
    END,
    PICTURES,
    Records,
    performance_page,
    summary,
    with_summary,
)

ROOT = Path(__file__).parent.parent
RECORDS = Records.read(ROOT / "benchmarks" / "results")
PAGE, README = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/performance.md", "README.md"))
REMEDY = "run python -m lowmem_bagel.benchmarks.tables"


def test_the_page_is_what_the_records_give() -> None:
    assert performance_page(RECORDS) == PAGE, REMEDY


def test_the_readmes_figures_are_the_records() -> None:
    assert with_summary(README, RECORDS) == README, REMEDY
    assert summary(RECORDS) in README
    with pytest.raises(ValueError, match="unpack"):
        with_summary("no markers", RECORDS)
    assert with_summary(f"a {BEGIN} old {END} b", RECORDS) == f"a {BEGIN}\n{summary(RECORDS)}\n{END} b"


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


def test_one_run_is_called_one_run() -> None:
    assert "Each row was run once" in PAGE
    assert all(len(figures["runs"]) == 1 for figures in RECORDS.engine["results"])
    more = deepcopy(RECORDS)
    more.engine["settings"]["repeat"] = 3
    assert "median of at most 3 runs" in " ".join(performance_page(more).split())


def test_a_star_marks_what_was_measured_again() -> None:
    again = {figures["row"] for figures in RECORDS.newer["results"]}
    assert again <= {*PICTURES, *ANSWERS}
    assert all(len(figures["runs"]) == 1 for figures in RECORDS.newer["results"])
    assert sum(line.count(r" \* |") for line in PAGE.splitlines()) == len(again)
    assert f"star are of commit {RECORDS.newer['commit']}" in " ".join(PAGE.split())
    assert RECORDS.row("int8::ask") in RECORDS.newer["results"]
    assert RECORDS.row("int8:8") in RECORDS.engine["results"]


def test_the_libraries_stand_beside_our_kernels() -> None:
    section = PAGE.split("## The libraries' kernels on our files")[1].split("\n## ")[0]
    rows = RECORDS.libraries["results"]
    assert {Row.parse(figures["row"]).backend for figures in rows} == {"auto", "bitsandbytes", "quanto", "dfloat11"}
    for figures in rows:
        spread = figures["seconds"]
        assert f"| {spread['min']:.2f} to {spread['max']:.2f} |" in section


def test_the_records_are_of_one_kind_of_machine() -> None:
    for record in (RECORDS.floor, RECORDS.newer, RECORDS.libraries):
        assert record["versions"] == RECORDS.engine["versions"]
        for part in ("gpu", "cpu", "gpu_bytes"):
            assert record["hardware"][part] == RECORDS.engine["hardware"][part], part
    assert (
        RECORDS.engine["settings"]["size"] == RECORDS.floor["settings"]["size"] == RECORDS.upstream["settings"]["size"]
    )


def test_the_commands_name_every_row() -> None:
    block = PAGE.split("## Measuring again")[1]
    assert {figures["row"] for figures in RECORDS.engine["results"]} <= set(re.split(r"\s+", block))
    for name in ("engine_h200", "floor_h200"):
        assert f"benchmarks/results/{name}.json" in block
        assert json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["results"]
