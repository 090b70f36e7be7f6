"""Shards: which tensors go into which file, decided before anything is converted, and a file's bytes.

The plan depends on the source's sizes alone. So an interrupted conversion meets the same shards again, and their
names can carry their number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowmem_bagel.checkpoint.folder import VAE_FILE
from lowmem_bagel.checkpoint.tensors import TensorSpec

from .base import Unit

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_SHARD_BYTES = 1 << 30
ALIGNMENT = 64
_SAFETENSORS_DTYPE = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_SAME_INPUT = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


@dataclass(frozen=True)
class Shard:
    name: str
    units: tuple[Unit, ...]


def plan_units(specs: Iterable[TensorSpec]) -> list[Unit]:
    """Weights that multiply the same input together, every other tensor alone, in the given order."""
    units: list[list[TensorSpec]] = []
    for spec in specs:
        last = units[-1][-1] if units else None
        if last is not None and _input(spec) is not None and _input(spec) == _input(last):
            units[-1].append(spec)
        else:
            units.append([spec])
    return [Unit(tuple(unit)) for unit in units]


def plan_shards(units: Iterable[Unit], nbytes: Callable[[TensorSpec], int], limit: int) -> list[Shard]:
    """Consecutive units up to `limit` bytes of the source a shard; a larger unit has its own. The VAE stays in
    `ae.safetensors`, as in the published checkpoint."""
    shards: list[list[Unit]] = []
    vae: list[Unit] = []
    filled = limit
    for unit in units:
        if unit.specs[0].part == "vae":
            vae.append(unit)
            continue
        size = sum(map(nbytes, unit.specs))
        if filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(unit)
        filled += size
    named = [Shard(f"model-{i:05}-of-{len(shards):05}.safetensors", tuple(shard)) for i, shard in enumerate(shards, 1)]
    return [*named, Shard(VAE_FILE, tuple(vae))] if vae else named


def tensor_sha256(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the tensors' bytes, one after the other."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _input(spec: TensorSpec) -> tuple[object, ...] | None:
    """What weights have in common that are multiplied by the same input; or, of routed experts, by inputs that are made
    alike."""
    fused = _SAME_INPUT.get(spec.linear or "", None if spec.routed is None else spec.linear)
    return (spec.layer, spec.expert, fused) if fused else None


def header(tensors: Sequence[tuple[str, Tensor]]) -> memoryview:
    """What stands before the data of these tensors in a safetensors file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _SAFETENSORS_DTYPE[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return memoryview(len(text).to_bytes(8, "little") + text)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor, not copied where it is contiguous."""
    import torch

    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
