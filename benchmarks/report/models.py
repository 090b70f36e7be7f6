"""The models of a report: what a row's format stands for, and what it takes on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_bagel.checkpoint.tensors import only_for_pictures, tensor_table
from lowmem_bagel.formats.registry import format_spec
from lowmem_bagel.planner.facts import stored_names

if TYPE_CHECKING:
    from lowmem_bagel.checkpoint.folder import ModelFolder


def files(folder: ModelFolder) -> list[Path]:
    """The files that hold a model's tensors; none of random weights, which are in memory alone."""
    return [file.path for file in folder.files if file.path.is_file()]


def sizes(folder: ModelFolder) -> dict[str, int]:
    """Bytes on disk: `stored_bytes` of the files of weights (of random ones, what they would hold), `stored_und_bytes`
    of the tensors among them that a variant keeps which only answers."""
    nbytes = {name: sum(piece.entry.nbytes for piece in tensor.pieces) for name, tensor in folder.stored.items()}
    on_disk = sum(path.stat().st_size for path in files(folder))
    layout = format_spec(folder.format).layout(folder)
    answering: set[str] = set()
    for spec in tensor_table(folder.config).values():
        if not only_for_pictures(spec):
            answering.update(stored_names(folder, spec.name, layout))
    of_answers = sum(nbytes.get(name, 0) for name in answering)
    return {"stored_bytes": on_disk or sum(nbytes.values()), "stored_und_bytes": of_answers}


def drop_from_cache(folder: ModelFolder) -> bool:
    """Have the system forget what it keeps of a model's files, so that they are read from the disk.

    False where it cannot be asked for that, or there are no files.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    found = files(folder)
    for path in found:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not written yet stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return bool(found)
