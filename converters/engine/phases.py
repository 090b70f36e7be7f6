"""The stages of a conversion by name, for whoever wants to know how long each was at work. They overlap."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

READ, SOURCE_HASH, ENCODE = "read", "source hash", "encode and errors"
STORED_HASH, WRITE, SYNC, READ_BACK, FILE_HASH = "stored hash", "write", "sync", "read back", "file hash"

Phases = Callable[[str], AbstractContextManager[object]]
"""Called with a stage's name, on any thread: what its work is done inside of."""


def untimed(name: str) -> AbstractContextManager[object]:
    """For a conversion that nobody times."""
    return nullcontext()
