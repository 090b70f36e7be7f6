"""Headers are validated before anything is believed; tensors come without copies and bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lowmem_bagel.checkpoint.safetensors_file import DTYPE_BYTES, SafetensorsFile, torch_dtype
from lowmem_bagel.errors import CheckpointError


def written(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with any header, well-formed or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("dtype", sorted(DTYPE_BYTES))
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    kind = torch_dtype(dtype)
    raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (3 * 5 * DTYPE_BYTES[dtype],), dtype=torch.uint8)
    value = raw.view(kind).view(3, 5)
    save_file({"odd": torch.zeros(3, dtype=torch.uint8), "x": value}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    found = file.tensor("x")
    assert (found.dtype, found.shape) == (kind, (3, 5))
    assert torch.equal(found.clone().view(torch.uint8), value.view(torch.uint8))
    assert bytes(file.raw("x")) == raw.numpy().tobytes()


def test_unaligned_data_is_read_right(tmp_path: Path) -> None:
    """The format does not demand alignment."""
    values = torch.randn(7)
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [7], [1, 29])}
    path = written(tmp_path / "a.safetensors", header, b"\0" + values.numpy().tobytes())
    assert torch.equal(SafetensorsFile(path).tensor("b"), values)


def test_tensors_outlive_the_file_object(tmp_path: Path) -> None:
    values = torch.randn(1000)
    save_file({"x": values}, tmp_path / "a.safetensors")
    found = SafetensorsFile(tmp_path / "a.safetensors").tensor("x")
    assert torch.equal(found, values)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.tensor("scalar").item() == 2.5
    assert file.tensor("empty").shape == (0, 4)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a.safetensors is missing"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_truncated_data_names_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"first": torch.zeros(100), "last": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"tensor last: the file ends before its data \(truncated\)"):
        SafetensorsFile(path)


@pytest.mark.parametrize("content", [b"1234567", b"\xff" * 8, (100).to_bytes(8, "little") + b"{}"])
def test_not_a_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        SafetensorsFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "header is damaged"),
        (b"\xff\xfe{}", "header is damaged"),
        (b"[" * 100_000, "header is damaged"),
        (b'{"a": 1, "a": 2}', "a key appears twice"),
        ([1], "not a JSON object"),
        ({"t": 5}, "tensor t: its header entry is not an object"),
        ({"t": entry("F6_E3M2")}, "tensor t: unknown dtype 'F6_E3M2'"),
        ({"t": entry(shape=[-2])}, "tensor t: its shape"),
        ({"t": entry(shape=[2.0])}, "tensor t: its shape"),
        ({"t": entry(shape=[True, 2])}, "tensor t: its shape"),
        ({"t": entry(shape=[1] * 9)}, "tensor t: its shape"),
        ({"t": entry(offsets=[0])}, "tensor t: its data offsets"),
        ({"t": entry(offsets=[-8, 0])}, "tensor t: its data offsets"),
        ({"t": entry(offsets=[8, 0])}, "tensor t: its shape needs 8 bytes and the header gives -8"),
        ({"t": entry(shape=[3])}, "tensor t: its shape needs 12 bytes and the header gives 8"),
        ({"t": entry(shape=[2**47, 2**47])}, "tensor t: its shape needs"),
        ({"t": entry(offsets=[8, 16]), "u": entry(offsets=[12, 20])}, "tensor u overlaps another"),
    ],
)
def test_headers_that_lie(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(written(tmp_path / "a.safetensors", header, bytes(64)))


@settings(max_examples=300)
@given(position=st.integers(0, 400), byte=st.integers(0, 255))
def test_any_damaged_byte_is_refused_or_harmless(tmp_path_factory: Any, position: int, byte: int) -> None:
    """Whatever a header is turned into, the answer is a CheckpointError or tensors inside the file."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"weight": torch.zeros(3, 4), "bias": torch.zeros(3, dtype=torch.bfloat16)}, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for found in file.entries.values():
        assert found.start >= 8
        assert found.start + found.nbytes <= len(content)
        assert file.tensor(found.name).numel() * DTYPE_BYTES[found.dtype] == found.nbytes
