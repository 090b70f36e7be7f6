"""What the tests of the converters share: editable copies of the golden checkpoint, and folders as bytes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lowmem_bagel.converters.bf16 import Bf16Converter
from lowmem_bagel.converters.dfloat11 import Dfloat11Converter
from lowmem_bagel.converters.engine.base import Converter
from lowmem_bagel.converters.engine.convert import convert
from lowmem_bagel.converters.fp16 import Fp16Converter
from lowmem_bagel.converters.gguf import by_type
from lowmem_bagel.converters.int8 import Int8Converter
from lowmem_bagel.converters.nf4 import Nf4Converter
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_bagel.checkpoint.config_files import config_of
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.manifest import Manifest, TensorRecord, read_manifest
from lowmem_bagel.checkpoint.tensors import TensorSpec, tensor_table
from lowmem_bagel.errors import CheckpointError, ConversionError
from support.paths import CHECKPOINT

SMALL_SHARDS = 256 << 10
"""Makes about twenty shards of the golden checkpoint."""

CONVERTERS: dict[str, Callable[[], Converter]] = {
    "bf16": lambda: Bf16Converter({}),
    "dfloat11": lambda: Dfloat11Converter({}),
    "int8": lambda: Int8Converter({}),
    "int8 rotated": lambda: Int8Converter({"rotate": True, "embeddings": True}),
    "fp16": lambda: Fp16Converter({}),
    "nf4": lambda: Nf4Converter({}),
    "gguf-q8_0": lambda: by_type({}),
}

TABLE = tensor_table(config_of(CHECKPOINT))
LAYER = "language_model.model.layers.1."
Q = LAYER + "self_attn.q_proj.weight"
NORM = LAYER + "input_layernorm.weight"
UND: dict[str, Any] = {"experts": ("und",)}


def copy_checkpoint(folder: Path, edit: Callable[[dict[str, Tensor]], None] | None = None) -> Path:
    """A writable copy of the golden checkpoint, its tensors (all but the VAE's) changed by `edit`."""
    folder.mkdir(parents=True)
    for path in CHECKPOINT.iterdir():
        shutil.copyfile(path, folder / path.name)
    if edit is not None:
        tensors = load_file(folder / "ema.safetensors")
        edit(tensors)
        save_file(tensors, folder / "ema.safetensors")
    return folder


def contents(folder: Path) -> Mapping[str, bytes]:
    """Every file of a folder; two folders are equal when these are."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@cache
def _golden() -> ModelFolder:
    return ModelFolder.open(CHECKPOINT)


def golden_tensor(name: str) -> Tensor:
    return _golden().tensor(name).clone()


def restored(folder: ModelFolder, converter: Converter, record: TensorRecord) -> Tensor:
    """A tensor of a variant as the runtime would see it."""
    stored = {name: folder.tensor(name).clone() for name in record.stored}
    return stored[record.name] if record.encoding in ("bf16", "fp32") else converter.restore(record, stored)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def failure(source: Path, out: Path, name: str = "int8", **settings: Any) -> str:
    """The one line that a refused conversion says."""
    with pytest.raises((ConversionError, CheckpointError)) as caught:
        convert(source, out, CONVERTERS[name](), **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(name: str, value: float) -> Any:
    return lambda tensors: tensors[name].view(-1).__setitem__(5, value)


def is_linear(spec: TensorSpec) -> bool:
    return bool(re.search(r"language_model.*(_proj)(_moe_gen)?\.weight$", spec.name))


class Variants(dict[str, Path]):
    """The golden checkpoint in every format, converted when it is asked for; read only."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root, self.settings = root, settings

    def __missing__(self, name: str) -> Path:
        self[name] = self.root / name
        convert(CHECKPOINT, self[name], CONVERTERS[name](), shard_bytes=SMALL_SHARDS, **self.settings)
        return self[name]
