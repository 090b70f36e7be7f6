"""What ComfyUI loads, from its custom_nodes and under a name of its own. The nodes are the installed package's."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """ComfyUI's: the extension, whose nodes it then asks for."""
    from lowmem_bagel.integrations.comfyui.extension import extension

    return extension()
