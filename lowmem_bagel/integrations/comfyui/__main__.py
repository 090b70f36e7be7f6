"""`python -m lowmem_bagel.integrations.comfyui COMFYUI`: the node folder into ComfyUI's custom_nodes."""

from __future__ import annotations

import sys
from pathlib import Path

from ...errors import OutputError, UserError
from . import FOLDER

NAME = "lowmem-bagel"


def install(comfyui: Path) -> Path:
    """Copy the node folder, in place of one that was copied before; returns where to.

    Raises:
        OutputError: that is no ComfyUI, or it cannot be written.
    """
    import shutil

    nodes = comfyui / "custom_nodes"
    if not nodes.is_dir():
        raise OutputError(f"{comfyui} has no custom_nodes; give the folder of ComfyUI")
    try:
        copied = shutil.copytree(FOLDER, nodes / NAME, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    except (OSError, shutil.Error) as error:
        raise OutputError(f"{nodes / NAME}: cannot be written ({error}); check the folder's permissions") from error
    return Path(copied)


def main(arguments: list[str]) -> int:
    """Without an argument, where the folder lies that may be linked instead."""
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print("python -m lowmem_bagel.integrations.comfyui [COMFYUI]", file=sys.stderr)
        return 2
    try:
        print(install(Path(arguments[0])) if arguments else FOLDER)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
