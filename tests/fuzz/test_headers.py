"""Damaged and hostile safetensors headers, and DFloat11 components: read within the file, or refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import gguf
import pytest
import torch
from safetensors.torch import save_file
from support.fuzz import fuzz, mutated_bytes, mutated_value
from support.gguf_files import linears, write_gguf

from lowmem_bagel.checkpoint.check_tensors import check_tensors
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.gguf_blocks import BLOCK_TYPES
from lowmem_bagel.checkpoint.gguf_file import GgufFile
from lowmem_bagel.checkpoint.safetensors_file import SafetensorsFile
from lowmem_bagel.formats.check_parts import check_parts
from lowmem_bagel.formats.dfloat11.codec import decode, encode, from_tensors
from lowmem_bagel.formats.registry import format_spec

INPUTS = 600


def mutated_file(random: Random, content: bytes) -> bytes:
    """A file whose header's values, whose bytes or whose length are changed."""
    length = int.from_bytes(content[:8], "little")
    if random.random() < 0.7:
        text = json.dumps(mutated_value(random, json.loads(content[8 : 8 + length]))).encode()
        content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    if random.random() < 0.4:
        front = mutated_bytes(random, content[: 8 + length])
        content = front + content[8 + length :]
    if random.random() < 0.1:
        content = random.choice((0, 1, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    return content


def test_any_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"weight": torch.zeros(3, 4), "bias": torch.ones(3, dtype=torch.bfloat16), "empty": torch.zeros(0)}
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()

    def make(random: Random) -> Callable[[], object]:
        path.write_bytes(mutated_file(random, content))

        def read() -> None:
            file = SafetensorsFile(path)
            for name in file.entries:
                file.tensor(name).clone()
                bytes(file.raw(name))

        return read

    fuzz("safetensors", make, INPUTS, tmp_path)


NUMBERS = (0, 1, 2, 3, 4, 7, 8, 9, 10, 12, 31, 32, 255, 256, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def mutated_gguf(random: Random, header: bytes) -> bytes:
    """A header in which a number of 4 or 8 bytes, some bytes or the length are changed."""
    changed = bytearray(header)
    for _ in range(random.choice((1, 1, 2, 5))):
        width = random.choice((4, 8))
        # Mostly where numbers are: before the name of a key or a tensor, and behind it.
        place = random.randrange(len(changed) - width) if random.random() < 0.5 else random.choice(lengths(header))
        number = random.choice((*NUMBERS, random.randrange(2**16)))
        changed[place : place + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
    return mutated_bytes(random, bytes(changed)) if random.random() < 0.3 else bytes(changed)


@cache
def lengths(header: bytes) -> list[int]:
    """Places of the counts, and of what stands around the names in the header."""
    names = [match.span() for match in re.finditer(rb"[a-z][a-z_.0-9]{3,}", header)]
    return [4, 8, 16, *(place for start, end in names for place in (start - 8, end, end + 4, end + 12))]


def test_any_gguf(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "bagel")
    writer.add_string("bagel.file.config.json", "{}")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_array("some.floats", [1.0, 2.0])
    writer.add_custom_alignment(64)
    blocks = torch.zeros(2, BLOCK_TYPES["Q4_K"].nbytes, dtype=torch.uint8).numpy()
    writer.add_tensor("layers.quantised.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.add_tensor("layers.norm.weight", torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    start = GgufFile(path).header_bytes

    def make(random: Random) -> Callable[[], object]:
        path.write_bytes(mutated_gguf(random, content[:start]) + content[start:])

        def read() -> None:
            file = GgufFile(path)
            for name in file.entries:
                file.tensor(name).clone()
                bytes(file.raw(name))

        return read

    fuzz("gguf", make, INPUTS, tmp_path)


def test_any_gguf_model(tmp_path: Path) -> None:
    """Whatever a header says, what is let through has the sizes that multiply by it."""
    path = write_gguf(tmp_path / "a.gguf", linears("Q4_K"))
    start, size = GgufFile(path).header_bytes, path.stat().st_size
    header = path.read_bytes()[:start]

    def make(random: Random) -> Callable[[], object]:
        path.write_bytes(mutated_gguf(random, header))
        os.truncate(path, size)

        def check() -> None:
            opened = ModelFolder.open(path)
            check_tensors(opened, format_spec(opened.format).layout(opened).stored)
            assert all(stored.tensor().numel() for stored in opened.stored.values())

        return check

    fuzz("a GGUF model", make, INPUTS // 6, tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_shards_of_variants(variant_of: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    """Whatever a header says, what is let through has the shapes and dtypes that multiply by it."""
    folder = Path(shutil.copytree(variant_of(kind), tmp_path / "model"))
    path = max(folder.glob("model-*.safetensors"), key=lambda p: p.stat().st_size)
    content = path.read_bytes()

    def make(random: Random) -> Callable[[], object]:
        path.write_bytes(mutated_file(random, content))

        def check() -> None:
            opened = ModelFolder.open(folder)
            check_tensors(opened, format_spec(opened.format).layout(opened).stored)
            check_parts(opened)

        return check

    fuzz(f"a shard of {kind}", make, INPUTS // 10, tmp_path)


def test_dfloat11_components(tmp_path: Path) -> None:
    encoded = encode([torch.randn(40, 64).to(torch.bfloat16), torch.randn(64).to(torch.bfloat16)])
    decode(from_tensors(encoded.tensors, "module"))  # compiles what decodes

    def make(random: Random) -> Callable[[], object]:
        tensors = dict(encoded.tensors)
        for name in random.sample(list(tensors), random.choice((1, 1, 2))):
            tensors[name] = changed(random, tensors[name])
        return lambda: decode(from_tensors(tensors, "module"))

    fuzz("components of DFloat11", make, INPUTS, tmp_path)


def changed(random: Random, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with other values, another length, shape or dtype."""
    tensor = tensor.clone()
    kind = random.random()
    if kind < 0.6 and tensor.numel():
        flat = tensor.view(-1)
        for _ in range(random.choice((1, 3, 20))):
            high = 256 if tensor.dtype == torch.uint8 else 2**62
            flat[random.randrange(flat.numel())] = random.choice((0, 1, random.randrange(high), high - 1))
        return tensor
    if kind < 0.8:
        rows = random.randrange(tensor.shape[0] + 1)
        return tensor[:rows] if random.random() < 0.5 else torch.cat((tensor, tensor[:rows]))
    if kind < 0.9:
        return tensor.to(random.choice((torch.int16, torch.int64, torch.uint8, torch.float32, torch.bool)))
    return random.choice((tensor.flatten(), tensor[None], tensor.new_empty(0), tensor.new_empty(0, 256)))
