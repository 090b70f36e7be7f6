"""All nodes, as ComfyUI's V3 API takes them."""

from __future__ import annotations

from typing import Any

from . import models
from .nodes import NODES


def extension() -> Any:
    """A ComfyExtension whose nodes are `NODES`."""
    from comfy_api.latest import ComfyExtension

    return type("BagelExtension", (_Nodes, ComfyExtension), {})()


class _Nodes:
    """What a ComfyExtension is asked for."""

    async def on_load(self) -> None:
        models.register()

    async def get_node_list(self) -> list[type]:
        return [comfy_node(node) for node in NODES]


def comfy_node(node: type) -> type:
    """A node as one of ComfyUI's: ours are plain classes, so that they can be imported without it."""
    from comfy_api.latest import io

    return type(node.__name__, (node, io.ComfyNode), {"__module__": node.__module__, "__doc__": node.__doc__})
