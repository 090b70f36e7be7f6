"""GGUF files as other programs make them: by the package `gguf`, of the embedded demo checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from lowmem_bagel.checkpoint.tensors import tensor_table
from lowmem_bagel.demo_checkpoint import FOLDER
from lowmem_bagel.formats.gguf.codec import encode
from support.layouts import Parts, demo

HELD = "bagel.file."
Kinds = Callable[[str], str | None]
"""A tensor's name -> the type of its blocks; None where it stays as it is."""


def linears(kind: str) -> Kinds:
    """All decoder linears in one type."""
    from lowmem_bagel.checkpoint.folder import ModelFolder

    table = tensor_table(ModelFolder.open(FOLDER).config)
    return lambda name: kind if name in table and table[name].linear else None


def write_gguf(
    path: Path, kinds: Kinds, parts: Parts | None = None, *, architecture: str = "bagel",
    keys: Mapping[str, object] | None = None, held: bool = True,
) -> Path:  # fmt: skip
    """The model with its VAE in one file, its small files as texts where they are `held`; `keys`: texts beside them."""
    parts = parts or demo()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("some.numbers", [1, 2, 3])
    texts = {name: json.dumps(values) for name, values in parts.configs.items()}
    texts |= {name: data.decode() for name, data in parts.files.items()}
    if held:
        for name, text in texts.items():
            writer.add_string(HELD + name, text)
    for key, value in (keys or {}).items():
        writer.add_uint16(key, value) if isinstance(value, int) else writer.add_string(key, str(value))
    for name, tensor in (parts.tensors | parts.vae).items():
        _add(writer, name, tensor, kinds(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: str | None) -> None:
    if kind is not None:
        data = encode(tensor.bfloat16(), kind)[0].numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    elif tensor.dtype is torch.bfloat16:
        data = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
