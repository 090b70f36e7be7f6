"""What goes into custom_nodes: light, without code of its own, and loaded under whatever name it has there."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.comfy import Comfy

from lowmem_bagel import __version__
from lowmem_bagel.integrations.comfyui import FOLDER
from lowmem_bagel.integrations.comfyui.__main__ import NAME, main


def test_importing_the_nodes_imports_neither_torch_nor_comfyui() -> None:
    code = (
        "import sys, runpy, lowmem_bagel.integrations.comfyui.extension; "
        "from lowmem_bagel.integrations.comfyui import FOLDER; runpy.run_path(str(FOLDER / '__init__.py')); "
        "print('\\n'.join(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "lowmem_bagel.integrations.comfyui.nodes.drawing" in loaded
    assert not {"torch", "numpy", "PIL", "comfy", "comfy_api", "folder_paths"} & set(loaded)


def test_what_the_manager_reads_is_this_package() -> None:
    about = tomllib.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))
    assert about["project"]["version"] == __version__
    assert {"PublisherId", "DisplayName", "Icon"} <= about["tool"]["comfy"].keys()
    assert about["project"]["dependencies"] == (FOLDER / "requirements.txt").read_text().split()


def test_it_is_copied_into_comfyui_and_works_there(
    comfy: Comfy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "custom_nodes").mkdir()
    for _ in range(2):  # again, in place of the first
        assert main([str(tmp_path)]) == 0
    copied = tmp_path / "custom_nodes" / NAME
    assert capsys.readouterr().out.split() == [str(copied)] * 2
    assert (copied / ".comfyignore").is_file() and not list(copied.rglob("__pycache__"))
    # As ComfyUI does: under a name that is a path.
    spec = importlib.util.spec_from_file_location(f"{copied}", copied / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    asyncio.run(extension.on_load())
    ids = [node.define_schema().node_id for node in asyncio.run(extension.get_node_list())]
    assert "LowmemBagelLoad" in ids and len(ids) == len(set(ids))


def test_what_is_no_comfyui_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "has no custom_nodes" in capsys.readouterr().err
    assert main([]) == 0 and capsys.readouterr().out.strip() == str(FOLDER)
    assert main(["a", "b"]) == 2
