"""Tensors encoded in memory are those that a conversion stores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowmem_bagel.converters.engine.in_memory import encode_tensors
from lowmem_bagel.converters.engine.registry import convert_folder
from support.paths import CHECKPOINT

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import tensor_table


@pytest.mark.parametrize("format", ["dfloat11", "int8", "fp16", "gguf-q8_0"])
def test_the_same_is_stored(tmp_path: Path, format: str) -> None:
    source = ModelFolder.open(CHECKPOINT)
    tensors = {spec: source.tensor(name) for name, spec in tensor_table(source.config).items() if name in source.stored}
    before = {spec.name: tensor.clone() for spec, tensor in tensors.items()}
    found, entries = encode_tensors(format, {}, tensors)
    manifest = convert_folder(CHECKPOINT, tmp_path / "variant", format)
    variant = ModelFolder.open(tmp_path / "variant")
    assert {spec.name for spec in found} == set(manifest.tensors)
    assert ("dfloat11_config" in entries) == (format == "dfloat11")
    for spec, weight in found.items():
        assert weight.encoding == manifest.tensors[spec.name].encoding
        for name, tensor in weight.stored.items():
            assert torch.equal(tensor.reshape(-1), variant.tensor(name).reshape(-1)), name
    assert all(torch.equal(tensor, before[spec.name]) for spec, tensor in tensors.items()), "what is given stays"
