"""Things in a file's place that are no ordinary file."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # its name may have no more than about a hundred bytes


NOT_ORDINARY: Mapping[str, Callable[[Path], object]] = {
    "fifo": os.mkfifo,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "folder": Path.mkdir,
    "socket": _socket,
}
"""What makes each at a path."""


def in_place(kind: str, path: Path) -> Path:
    """The path, where now one of NOT_ORDINARY is, instead of what was there before."""
    path.unlink(missing_ok=True)
    NOT_ORDINARY[kind](path)
    return path
