"""What a user's machine keeps because finding it out takes time: JSON files that are there whole or not at all.

Nothing depends on them: one that is missing, damaged or cannot be written is found out anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "lowmem-bagel"


def cache_folder(environment: Mapping[str, str] = os.environ, platform: str = sys.platform) -> Path:
    """The user's folder for this package; it may not be there yet.

    Raises:
        OSError: the user has no home.
    """
    windows = platform == "win32"
    named = environment.get("LOCALAPPDATA" if windows else "XDG_CACHE_HOME", "")
    if Path(named).is_absolute():
        return Path(named) / FOLDER
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return (home / "AppData" / "Local" if windows else home / ".cache") / FOLDER


def kept(path: Path) -> Any:
    """The value that was kept there; None where there is none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def keep(path: Path, value: Any) -> None:
    """Write the value, in place of what is there. Readers and other writers meanwhile find a whole file.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
