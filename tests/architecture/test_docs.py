"""The documentation names what is in the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.paths import ROOT

from lowmem_bagel.diagnostics.features import feature_names
from lowmem_bagel.hardware.torch_builds import CPU_COMMAND, CUDA_12_COMMAND, CUDA_13_COMMAND

NOT_ROOMS = {"__init__.py", "__pycache__", "py.typed"}
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "lowmem_bagel"
ROOMS = {path.name + ("/" if path.is_dir() else "") for path in PACKAGE.iterdir() if path.name not in NOT_ROOMS}


def test_architecture_names_every_room_and_none_that_is_gone() -> None:
    table = ARCHITECTURE.split("## The folders")[1].split("\n## ")[0]
    named = {
        name for row in re.findall(r"^\| (`.+?) \|", table, flags=re.MULTILINE) for name in re.findall(r"`(.+?)`", row)
    }
    assert named == ROOMS | {"converters/", "benchmarks/"}


def test_installation_names_every_switch() -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    assert [name for name in feature_names() if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "docs/installation.md"])
def test_builds_of_pytorch_are_those_that_doctor_names(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in (CPU_COMMAND, CUDA_12_COMMAND, CUDA_13_COMMAND):
        assert f"`{command.replace(' --force-reinstall', '')}`" in text
