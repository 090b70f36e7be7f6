"""Whether a variant's encoded weights are stored as their format declares: what multiplies by them relies on it."""

from __future__ import annotations

from ..checkpoint.folder import ModelFolder
from ..checkpoint.tensors import tensor_table
from ..errors import CheckpointError
from .registry import format_spec, formats
from .spec import FormatSpec

PLAIN = ("bf16", "fp16", "fp32")
"""Encodings of weights that are not encoded, in variants of any format."""


def check_parts(folder: ModelFolder) -> None:
    """Compare every encoded weight's tensors with its format's declaration; no weight is read.

    Raises:
        CheckpointError: names the first tensor of another dtype or shape, or in an encoding that the format lacks.
    """
    if folder.manifest is None:
        return
    spec = format_spec(folder.format)
    for name, shape in {spec.name: spec.shape for spec in tensor_table(folder.config).values()}.items():
        record = folder.manifest.tensors.get(name)
        if record is None or record.encoding in PLAIN:
            continue
        own = formats().get(record.encoding)
        if own is None or not spec.holds(own.name):
            raise CheckpointError(
                f"{folder.path}: tensor {name} is kept as {record.encoding}, which {spec.name} folders do not hold; "
                "convert the folder again"
            )
        _check(folder, own, name, tuple(size or 0 for size in shape))


def _check(folder: ModelFolder, spec: FormatSpec, weight: str, shape: tuple[int, ...]) -> None:
    for part in spec.parts:
        entry = folder.entry(weight + part.suffix)
        if (entry.dtype, entry.shape) != (part.dtype, part.shape(shape)):
            raise CheckpointError(
                f"{folder.path}: tensor {entry.name} is {entry.dtype} {list(entry.shape)}, and {spec.name} demands "
                f"{part.dtype} {list(part.shape(shape))}; convert the folder again"
            )
