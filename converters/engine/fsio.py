"""The few file operations that crash safety rests on: after each returns, its effect survives a power cut."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def rename(old: Path, new: Path) -> None:
    """One atomic step; `new` is replaced if it is a file. Durable after `fsync_folder` of the parent."""
    os.replace(old, new)


def fsync_folder(folder: Path) -> None:
    """Make creations and renames in `folder` durable. Windows has no such call and orders them itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that it appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rename(temporary, path)
    fsync_folder(path.parent)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours; one that is not there is no error, anything else that fails is."""
    if folder.exists():
        shutil.rmtree(folder)
