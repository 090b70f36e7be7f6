"""The wheel holds everything that the checkout has, and works without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from support.modules import FOLDERS, MODULES
from support.paths import ROOT

STORED = {"--build-option": ["--compression", "stored"]}
"""What is in it is the same, and weights take long to compress."""
BUILD = f"import setuptools.build_meta, sys; print(setuptools.build_meta.build_wheel(sys.argv[1], {STORED}))"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, built from a copy so that nothing is left in the checkout."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building needs setuptools 77 or newer, which the extra 'dev' brings")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for folder in ("lowmem_bagel", "converters", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=copy, check=True, capture_output=True)
    [wheel] = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out / "site")
    return out / "site"


def test_every_module_is_in_it(unpacked: Path) -> None:
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*.py")}
    wanted = {
        f"{name.replace('.', '/')}/__init__.py" if path.name == "__init__.py" else f"{name.replace('.', '/')}.py"
        for name, path in MODULES.items()
    }
    assert found == wanted


def test_every_data_file_is_in_it(unpacked: Path) -> None:
    package = FOLDERS["lowmem_bagel"]
    wanted = {
        path.relative_to(package)
        for pattern in (
            "py.typed",
            "**/*.cu",
            "**/*.cuh",
            "demo_checkpoint/*.json",
            "demo_checkpoint/*.safetensors",
            "demo_checkpoint/*.txt",
            "integrations/comfyui/node_folder/*.toml",
            "integrations/comfyui/node_folder/*.txt",
            "integrations/comfyui/node_folder/.comfyignore",
            "integrations/comfyui/node_folder/example_workflows/*",
            "planner/*.json",
            "serve/page/*.css",
            "serve/page/*.svg",
        )
        for path in package.glob(pattern)
    }
    assert len(wanted) >= 3
    assert not [path for path in wanted if not (unpacked / "lowmem_bagel" / path).is_file()]


def test_licence_and_credits_are_in_it(unpacked: Path) -> None:
    names = {path.name for path in unpacked.glob("*.dist-info/licenses/*")}
    assert names == {"LICENSE", "NOTICE"}


def test_nothing_generic_lands_beside_it(unpacked: Path) -> None:
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == {"lowmem_bagel"}


def test_it_runs_outside_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    """Python's path begins with the unpacked wheel, so that an editable installation does not come first."""
    environment = os.environ | {"PYTHONPATH": str(unpacked)}

    def run(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    where = "import lowmem_bagel.converters.engine.base as b, lowmem_bagel as l; print(b.__file__, l.__file__)"
    assert all(path.startswith(str(unpacked)) for path in run(where).split())
    assert "generate" in run("from lowmem_bagel.cli import main; main()", "--help")


def test_entry_points_exist(unpacked: Path) -> None:
    [listing] = unpacked.glob("*.dist-info/entry_points.txt")
    targets = re.findall(r"= ([\w.]+):(\w+)", listing.read_text())
    assert len(targets) >= 6
    for module, name in targets:
        assert re.search(rf"^(def|class) {name}\b|^{name}\b.* = ", MODULES[module].read_text(), re.MULTILINE), name
