"""Models by name: what is below ComfyUI's models folders."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.comfy import Comfy

from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.integrations.comfyui import models


@pytest.fixture
def root(comfy: Comfy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    import folder_paths

    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"loras": ([str(tmp_path / "loras")], set())})
    (tmp_path / "bagel").mkdir()
    return tmp_path / "bagel"


def test_folders_and_files_that_are_models(root: Path) -> None:
    for name in (
        "b-int8/variant.json",
        "a-source/llm_config.json",
        "shards/ema.safetensors",
        "half.partial/variant.json",
        "notes/readme.txt",
    ):
        (root / name).parent.mkdir()
        (root / name).touch()
    for name in ("one.safetensors", "one.gguf", "readme.md"):
        (root / name).touch()
    assert models.model_names() == ["a-source", "b-int8", "one.gguf", "one.safetensors", "shards", models.DEMO]
    assert models.model_path("b-int8") == root / "b-int8"
    assert models.model_path("one.gguf") == root / "one.gguf"


def test_a_path_comes_before_the_name(root: Path, tmp_path: Path) -> None:
    (root / "named").mkdir()
    assert models.model_path(models.DEMO) == FOLDER
    assert models.model_path(models.DEMO, f" {tmp_path} ") == tmp_path
    assert models.model_path(models.DEMO, "named") == root / "named", "a name below the root will do"


def test_an_adapter_by_its_name_and_weight(root: Path) -> None:
    adapter = root.parent / "loras" / "style"
    adapter.mkdir(parents=True)
    assert models.found("style:0.5", models.ADAPTERS) == f"{adapter}:0.5"
    assert models.found("style", models.ADAPTERS) == str(adapter)
    assert models.found("/elsewhere:0.5", models.ADAPTERS) == "/elsewhere:0.5"


def test_without_a_folder_there_is_the_demo(root: Path) -> None:
    root.rmdir()
    assert models.model_names() == [models.DEMO]
