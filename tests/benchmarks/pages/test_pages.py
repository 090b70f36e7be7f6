"""Every page is what the committed records give, and nothing on it is there without them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import pytest
from lowmem_bagel.benchmarks.pages import PAGES
from lowmem_bagel.benchmarks.pages.fidelity import FIDELITY
from lowmem_bagel.benchmarks.pages.page import Page, again
from lowmem_bagel.benchmarks.record import read_records
from support.command import Ran
from support.paths import RESULTS, ROOT

RECORDS = read_records(RESULTS)
PARTS = {f"{page.path}, {name}": make for page in PAGES for name, make in page.parts.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path)
def test_a_page_is_what_the_records_give(page: Page) -> None:
    text = (ROOT / page.path).read_text(encoding="utf-8")
    assert page.text(RECORDS, text) == text, "run lowmem-bagel bench pages"
    assert set(page.parts) == set(re.findall(r"<!-- end of (.*) -->", text))


@pytest.mark.parametrize("name", PARTS)
def test_a_part_changes_with_the_records(name: str) -> None:
    """Figures that are written into the code instead of being read would show the same of other records."""
    assert PARTS[name](OTHER) != PARTS[name](RECORDS)


def test_packaged_data_changes_with_the_records() -> None:
    now, other = (json.loads(FIDELITY.text(records, "")) for records in (RECORDS, OTHER))
    for kind in now:
        for name, found in now[kind].items():
            assert other[kind][name] == doubled(found) and set(found["records"]) <= set(RECORDS)


def changed(record: Any) -> Any:
    if isinstance(record, str):
        return record + "and more"
    return {**doubled(record), "command": "lowmem-bagel bench another --out record.json"}


def doubled(value: Any) -> Any:
    """The same with every number twice as large, and every version another."""
    if isinstance(value, dict):
        return {key: doubled(each) for key, each in value.items()}
    if isinstance(value, list):
        return [doubled(each) for each in value]
    if isinstance(value, str):
        return f"{value}9" if re.fullmatch(r"\d+\.\d+\.\d+", value) else value
    return 2 * value if isinstance(value, (int, float)) and not isinstance(value, bool) else value


OTHER = {key: changed(record) for key, record in RECORDS.items()}
"""Records of the same form with other figures."""


def test_only_what_is_between_markers_is_replaced() -> None:
    page = Page("x.md", {"one": lambda records: records["n"], "two": lambda records: "2"})
    before = "a <!-- one --> old <!-- end of one --> b <!-- two --><!-- end of two --> c"
    after = "a <!-- one -->\n1\n<!-- end of one --> b <!-- two -->\n2\n<!-- end of two --> c"
    assert page.text({"n": "1"}, before) == after
    assert page.text({"n": "1"}, after) == after
    with pytest.raises(ValueError, match="unpack"):
        page.text({"n": "1"}, "no markers")


def test_the_command_writes_the_pages(tmp_path: Path, cli: Callable[..., Ran]) -> None:
    copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / FIDELITY.path).parent.mkdir(parents=True)
    copy(ROOT / FIDELITY.path, tmp_path / FIDELITY.path)
    copytree(RESULTS, tmp_path / "benchmarks" / "results")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme.replace("answers 499 of 500", "answers all"), encoding="utf-8")
    ran = cli("bench", "pages", "--checkout", tmp_path)
    assert ran.code == 0 and ran.out.count("as it was") == len(PAGES) - 1
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == readme
    assert "run this in a checkout" in cli("bench", "pages", "--checkout", tmp_path / "docs").error


def test_rows_by_backends_that_are_gone_are_left_out(tmp_path: Path) -> None:
    rows = [{"row": row} for row in ("dfloat11", "dfloat11:backend=fixed-length", "int8:backend=quanto")]
    (tmp_path / "some.json").write_text(json.dumps({"benchmark": "engine", "results": rows}))
    assert [row["row"] for row in read_records(tmp_path)["some"]["results"]] == ["dfloat11", "int8:backend=quanto"]
    assert "fixed-length" not in "".join((ROOT / page.path).read_text(encoding="utf-8") for page in PAGES)


def test_a_record_that_says_its_command_is_made_again_by_it() -> None:
    said = {"command": "LOWMEM_BAGEL_DISABLE=triton lowmem-bagel bench floor --repeat 3 --out /tmp/x.json"}
    shown = again({"new": said, "old": {}}, {"new": "floor --out RECORD", "old": "kernels --out RECORD"})
    assert shown.splitlines() == [
        "    LOWMEM_BAGEL_DISABLE=triton lowmem-bagel bench floor --repeat 3 --out benchmarks/results/new.json",
        "    lowmem-bagel bench kernels --out benchmarks/results/old.json",
        "    lowmem-bagel bench pages",
    ]


def test_reading_does_not_change_what_pages_are_made_from() -> None:
    before = deepcopy(RECORDS)
    for make in PARTS.values():
        make(RECORDS)
    assert before == RECORDS
