"""CONTRIBUTING.md names files and folders that are there, and every way to add from outside."""

import re

from support.paths import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_paths_are_there() -> None:
    paths = re.findall(r"`([\w.]+/[\w./]*)`", TEXT)
    assert len(paths) > 15
    # `formats/NAME/` stands for a folder that is to be made in one that is there.
    places = [path.split("NAME")[0] for path in paths]
    assert [place for place in places if not (ROOT / place).exists()] == []


def test_every_entry_point_group_is_named() -> None:
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "lowmem_bagel").rglob("*.py"))
    groups = set(re.findall(r'extensions\("(\w+)"', sources))
    assert len(groups) >= 5
    assert [group for group in sorted(groups) if f"`lowmem_bagel.{group}`" not in TEXT] == []
