"""What a model folder holds, added up from its JSON files and safetensors headers; no weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.folder import ModelFolder
from ..checkpoint.manifest import Manifest
from ..checkpoint.reading import Reading
from ..checkpoint.tensors import EXPERTS, TensorSpec, tensor_table
from ..checkpoint.variant_summary import PartSummary, encoded_bits_per_weight
from ..checkpoint.variant_summary import summarise as rows_of_manifest
from ..errors import CheckpointError
from .registry import format_spec

ENCODINGS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True)
class Summary:
    """A folder by part, expert and encoding. `manifest` is None where it has none: a source, or published DFloat11."""

    path: Path
    format: str
    manifest: Manifest | None
    rows: tuple[PartSummary, ...]
    reading: Reading = field(default_factory=Reading)
    """How the folder was read: what was chosen, completed, computed, ignored, and what it lacks."""

    @property
    def experts(self) -> tuple[str, ...]:
        if self.manifest is not None:
            return self.manifest.experts
        held = {row.expert for row in self.rows if row.part == "decoder"}
        return EXPERTS if "" in held else tuple(expert for expert in EXPERTS if expert in held)

    @property
    def total(self) -> PartSummary:
        counts = {name: sum(getattr(row, name) for row in self.rows) for name in ("tensors", "weights", "bytes")}
        return PartSummary("total", "", "", **counts, worst={})

    def to_json(self, tensors: bool = False) -> dict[str, Any]:
        """`tensors` adds a list of every tensor with its encoding, size, options and errors."""
        total = self.total
        record: dict[str, Any] = {
            "path": str(self.path),
            "format": self.format,
            "experts": list(self.experts),
            "weights": total.weights,
            "parts": [_part_json(row) for row in self.rows],
            "total": {"tensors": total.tensors, "weights": total.weights, "bytes": total.bytes},
        }
        if self.reading.lines:
            record["reading"] = self.reading.to_json()
        if self.manifest is not None:
            record["variant"] = _manifest_json(self.manifest)
        if tensors:
            record["tensors"] = list(self.tensors())
        return record

    def tensors(self) -> Iterator[dict[str, Any]]:
        """Every tensor of a variant, in the order of its data.

        Raises:
            CheckpointError: the folder has no manifest, and so no record of single tensors.
        """
        if self.manifest is None:
            raise CheckpointError(f"{self.path}: records no errors, having no variant.json; give a converted folder")
        for record in self.manifest.tensors.values():
            yield {
                "name": record.name,
                "encoding": record.encoding,
                "shape": list(record.shape),
                "bytes": record.bytes,
                "bits_per_weight": 8 * record.bytes / record.weights,
                "options": dict(record.options),
                "errors": dict(record.errors),
            }


def summarise(path: Path, weights: str | None = None, base: Path | None = None) -> Summary:
    """Add a folder up; `weights` and `base` as for `ModelFolder.open`.

    Raises:
        CheckpointError, ConfigError: the folder is not a usable checkpoint.
    """
    folder = ModelFolder.open(path, weights=weights, base=base)
    table = tensor_table(folder.config)
    manifest = folder.manifest
    rows = rows_of_manifest(manifest, table) if manifest is not None else _rows_of_headers(folder, table)
    return Summary(folder.path, folder.format, manifest, tuple(rows), folder.reading)


def _rows_of_headers(folder: ModelFolder, table: Mapping[str, TensorSpec]) -> list[PartSummary]:
    """Rows of a folder without a manifest. Tensors that encode weights of both experts count as shared by them."""
    layout = format_spec(folder.format).layout(folder).stored
    encoded: dict[str, list[TensorSpec]] = {}
    for weight, names in layout.items():
        for name in names:
            encoded.setdefault(name, []).append(table[weight])
    rows: dict[tuple[str, str, str], _Counts] = {}
    counted: set[str] = set()
    for name, stored in folder.stored.items():
        specs = encoded.get(name) or [table[name] for name in (name,) if name in table]
        expert = specs[0].expert if len({spec.expert for spec in specs}) == 1 else None
        plain = ENCODINGS.get(stored.entry.dtype, stored.entry.dtype.lower())
        encoding = folder.format if name in encoded and not stored.encoded else plain
        encoding = encoding if stored.view is None else stored.view.encoding
        row = rows.setdefault((specs[0].part if specs else "other", expert or "", encoding), _Counts())
        row.bytes += stored.disk_bytes
        if name not in encoded:
            row.tensors += 1
            row.weights += math.prod(stored.entry.shape)
        elif specs[0].name not in counted:
            counted.update(spec.name for spec in specs)
            row.tensors += len(specs)
            row.weights += sum(math.prod(size or 0 for size in spec.shape) for spec in specs)
    parts: list[str] = [*dict.fromkeys(spec.part for spec in table.values()), "other"]
    ordered = sorted(rows.items(), key=lambda item: parts.index(item[0][0]))
    return [PartSummary(*key, row.tensors, row.weights, row.bytes, {}) for key, row in ordered]


@dataclass
class _Counts:
    tensors: int = 0
    weights: int = 0
    bytes: int = 0


def _part_json(row: PartSummary) -> dict[str, Any]:
    worst = {error: {"value": value, "tensor": tensor} for error, (value, tensor) in row.worst.items()}
    return {
        "part": row.part, "expert": row.expert, "encoding": row.encoding, "tensors": row.tensors,
        "weights": row.weights, "bytes": row.bytes, "bits_per_weight": row.bits_per_weight, "worst": worst,
    }  # fmt: skip


def _manifest_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "format_version": manifest.format_version,
        "tool_version": manifest.tool_version,
        "options": dict(manifest.options),
        "source": manifest.source,
        "source_sha256": manifest.source_sha256,
        "shards": len(manifest.shards),
        "encoded_bits_per_weight": encoded_bits_per_weight(manifest),
    }
