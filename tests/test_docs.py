"""The documentation names what is in the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowmem_bagel.switches import NAMES
from lowmem_bagel.torch_builds import CPU_COMMAND, CUDA_12_COMMAND, CUDA_13_COMMAND

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lowmem_bagel"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
NAMED = set(re.findall(r"`([\w/]+\.py)`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))


@pytest.mark.parametrize("module", MODULES)
def test_architecture_names_every_module(module: str) -> None:
    assert module in NAMED, f"give {module} its line in docs/architecture.md"


def test_architecture_names_no_module_that_is_gone() -> None:
    gone = {name for name in NAMED if name not in MODULES and not (ROOT / name).exists()}
    assert gone == set()


def test_installation_names_every_switch() -> None:
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", ["README.md", "docs/installation.md"])
def test_builds_of_pytorch_are_those_that_doctor_names(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in (CPU_COMMAND, CUDA_12_COMMAND, CUDA_13_COMMAND):
        assert f"`{command.replace(' --force-reinstall', '')}`" in text
