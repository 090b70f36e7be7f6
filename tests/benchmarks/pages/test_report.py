"""The page of the report shows the records, and its plots were drawn from them."""

from __future__ import annotations

import re
from copy import deepcopy

from lowmem_bagel.benchmarks.pages.report import CARDS, CLAIMS, FIDELITY, PLACE, RECORD, REPORT, report, seeds, stamp
from lowmem_bagel.benchmarks.record import read_records
from lowmem_bagel.benchmarks.suites.pages import stamped
from support.paths import RESULTS, ROOT
from support.report_records import report_record

RECORDS = read_records(RESULTS)
PAGE = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")


def test_plots_were_drawn_from_the_records() -> None:
    assert stamped(ROOT / PLACE) == {stamp(RECORDS)}, "run lowmem-bagel bench pages"
    for name in (FIDELITY, CARDS):
        changed = deepcopy(RECORDS)
        changed[name]["commit"] = "another"
        assert stamp(changed) != stamp(RECORDS)


def test_every_plot_is_there_light_and_dark_and_none_besides() -> None:
    named = set(re.findall(r'(?:src|srcset)="report/(\S+\.png)"', PAGE))
    assert named == {path.name for path in (ROOT / PLACE).iterdir()}
    assert {name.replace(".png", "-dark.png") for name in named if "-dark" not in name} <= named
    assert PAGE.count("<img ") == len(re.findall(r'<img src="[^"]+" alt="[^"]{20,}">', PAGE))


def test_a_record_of_bench_report_takes_the_place_of_the_engines() -> None:
    records = {**RECORDS, RECORD: report_record()}
    text = REPORT.text(records, PAGE)
    assert "### Start-up" in text and "### Not measured" in text and f"[{RECORD}]" in text
    assert "out of memory" in text and "--shape bagel-7b" in text
    assert len(report(records).rows) == len(report_record()["results"]["rows"])


def test_claims_are_held_to_what_was_measured() -> None:
    section = seeds(RECORDS)
    assert section.count("confirmed") + section.count("corrected") == 2 * len(CLAIMS)
    changed = deepcopy(RECORDS)
    for row in changed[RECORD]["results"]["rows"]:
        row["bytes"] = dict.fromkeys(row["bytes"], 90e9)
    assert seeds(changed).count("do not fit") == len(CLAIMS)
