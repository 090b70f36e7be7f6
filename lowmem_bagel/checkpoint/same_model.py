"""Whether two folders hold the weights of one checkpoint, in whatever formats: cards that share the work may have each
its own."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

from ..errors import CheckpointError
from .folder import ModelFolder
from .tensors import TensorSpec, tensor_table

MOST_VALUES = 2 << 20
"""Of a tensor whose bytes are read to be compared: norms, biases, and what keys and values are projected by."""


def open_same(first: ModelFolder, path: str) -> tuple[ModelFolder, str]:
    """Another folder of the same model, and how that is known, in words.

    Raises:
        CheckpointError, ConfigError: it is unusable, or another model; or adapters were added to the first one.
    """
    if first.adapters:
        said = f"{path}: cannot have the adapters that are added to {first.path.name}"
        raise CheckpointError(f"{said}; convert the checkpoint with --lora, once for each format")
    other = ModelFolder.open(Path(path))
    return other, _known_to_be_same(first, other)


def _known_to_be_same(first: ModelFolder, other: ModelFolder) -> str:
    alike = replace(other.config, vae_resize=first.config.vae_resize, vit_resize=first.config.vit_resize)
    differs = [part.name for part in fields(alike) if getattr(alike, part.name) != getattr(first.config, part.name)]
    if differs:
        raise _another(first, other, f"has other dimensions ({', '.join(differs)})")
    compared = 0
    for spec in _telling(first, other):
        ours, theirs = _digest(first, spec), _digest(other, spec)
        if ours is None or theirs is None or ours[0] != theirs[0]:
            continue
        compared += 1
        if ours != theirs:
            raise _another(first, other, f"was made from another checkpoint: {spec.name} is another")
    if compared:
        return f"of the same checkpoint: {compared} tensors were the same before they were encoded"
    return "of the same dimensions; whether of the same checkpoint, its files do not say"


def _another(first: ModelFolder, other: ModelFolder, why: str) -> CheckpointError:
    return CheckpointError(f"{other.path}: {why}; it must be the model of {first.path}, in whatever format")


def _telling(first: ModelFolder, other: ModelFolder) -> Iterator[TensorSpec]:
    """All tensors where both manifests have their hashes; where bytes must be read, small ones of two layers."""
    ends = (0, first.config.decoder.num_layers - 1)
    hashed = first.manifest is not None and other.manifest is not None
    for spec in tensor_table(first.config).values():
        if hashed or (spec.layer in ends and math.prod(size or 1 for size in spec.shape) <= MOST_VALUES):
            yield spec


def _digest(folder: ModelFolder, spec: TensorSpec) -> tuple[str, str] | None:
    """A tensor's dtype and the hash of its bytes in the checkpoint; None where the folder does not tell."""
    if folder.manifest is not None:
        record = folder.manifest.tensors.get(spec.name)
        return None if record is None else (record.dtype, record.source_sha256)
    stored = folder.stored.get(spec.name)
    if stored is None or stored.encoded:
        return None
    return stored.entry.dtype, hashlib.sha256(stored.raw()).hexdigest()
