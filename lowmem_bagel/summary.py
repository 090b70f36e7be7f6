"""What a model folder holds, added up from its headers: nothing but JSON and safetensors headers is read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .folder import ModelFolder
from .tensors import tensor_table


def summarise(path: Path) -> dict[str, Any]:
    """Format, sizes per part and expert, and totals, ready for JSON.

    Raises:
        CheckpointError, ConfigError: the folder is not a usable checkpoint.
    """
    folder = ModelFolder.open(path)
    table = tensor_table(folder.config)
    parts: dict[tuple[str, str], dict[str, int]] = {}
    for name, stored in folder.stored.items():
        spec = table.get(name)
        key = (spec.part, spec.expert or "") if spec else ("other", "")
        row = parts.setdefault(key, {"tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += math.prod(stored.entry.shape)
        row["bytes"] += stored.entry.nbytes
    total = {field: sum(row[field] for row in parts.values()) for field in ("tensors", "weights", "bytes")}
    return {
        "path": str(path),
        "format": folder.format,
        "weights": total["weights"],
        "parts": [{"part": part, "expert": expert, **row} for (part, expert), row in parts.items()],
        "total": total,
    }
