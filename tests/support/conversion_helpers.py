"""What the tests of the converters share: editable copies of the golden checkpoint, and folders as bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch
from lowmem_bagel.converters.bf16 import Bf16Converter
from lowmem_bagel.converters.dfloat11 import Dfloat11Converter
from lowmem_bagel.converters.engine.base import Converter
from lowmem_bagel.converters.fp16 import Fp16Converter
from lowmem_bagel.converters.gguf import by_type
from lowmem_bagel.converters.int8 import Int8Converter
from lowmem_bagel.converters.nf4 import Nf4Converter
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.manifest import TensorRecord
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
