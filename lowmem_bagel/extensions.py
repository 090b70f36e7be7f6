"""What other distributions add to ours: formats, step caches, attention backends and options, found by entry points."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any


def extensions(kind: str) -> Mapping[str, Any]:
    """The objects registered under the entry-point group `lowmem_bagel.KIND`, by their names there.

    Our own stand in lists beside the code that uses them; these come after.
    """
    return {point.name: point.load() for point in entry_points(group=f"lowmem_bagel.{kind}")}
