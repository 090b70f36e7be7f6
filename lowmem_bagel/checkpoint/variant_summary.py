"""What a variant holds, added up: sizes per part and expert, bits a weight, and the errors that were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .manifest import Manifest, TensorRecord
from .tensors import TensorSpec


@dataclass(frozen=True)
class PartSummary:
    """One part of the model in one encoding. `worst` maps each measured error to its largest value and the tensor."""

    part: str
    expert: str
    encoding: str
    tensors: int
    weights: int
    bytes: int
    worst: Mapping[str, tuple[float, str]]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights if self.weights else 0.0


def summarise(manifest: Manifest, table: Mapping[str, TensorSpec]) -> list[PartSummary]:
    """Rows by part, expert ("" where both share it) and encoding, in the order of the table."""
    groups: dict[tuple[str, str, str], list[TensorRecord]] = {}
    for name, spec in table.items():
        record = manifest.tensors.get(name)
        if record is not None:
            groups.setdefault((spec.part, spec.expert or "", record.encoding), []).append(record)
    return [
        PartSummary(*key, len(rows), sum(r.weights for r in rows), _bytes(rows), _worst(rows))
        for key, rows in groups.items()
    ]


def encoded_bits_per_weight(manifest: Manifest) -> float:
    """Bits a weight over the tensors that the format re-encoded, all overhead included; 0 if there are none."""
    rows = [r for r in manifest.tensors.values() if r.encoding == manifest.format]
    return 8 * _bytes(rows) / sum(r.weights for r in rows) if rows else 0.0


def _bytes(rows: Iterable[TensorRecord]) -> int:
    return sum(record.bytes for record in rows)


def _worst(rows: Iterable[TensorRecord]) -> dict[str, tuple[float, str]]:
    worst: dict[str, tuple[float, str]] = {}
    for record in rows:
        for error, value in record.errors.items():
            if error not in worst or value > worst[error][0]:
                worst[error] = value, record.name
    return worst
