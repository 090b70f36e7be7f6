"""A variant whose encoded weights are not stored as their format declares is refused before anything multiplies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from lowmem_bagel.converters.engine.convert import convert
from support.conversion_helpers import CONVERTERS
from support.paths import CHECKPOINT

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import CheckpointError

Q = "language_model.model.layers.1.self_attn.q_proj.weight"


def rewritten(folder: Path, name: str, **changes: object) -> None:
    """Changes a tensor's entry in its shard's header, whose data stays."""
    path = ModelFolder.open(folder).stored[name].file.path
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[name] |= changes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def shape(folder: Path, name: str) -> list[int]:
    return list(ModelFolder.open(folder).entry(name).shape)


@pytest.mark.parametrize(
    ("kind", "suffix", "change"),
    [
        # Codes read as signed numbers would point before the table.
        ("nf4", "", lambda rows: {"dtype": "I8"}),
        ("nf4", "", lambda rows: {"shape": [rows[0] * 2, rows[1] // 2]}),
        ("nf4", "_absmax", lambda rows: {"dtype": "I32"}),
        ("int8", "", lambda rows: {"dtype": "U8"}),
        ("int8", "_scale", lambda rows: {"shape": [1, *rows]}),
        ("int8", "_scale", lambda rows: {"dtype": "I32"}),
    ],
)
def test_parts_of_another_dtype_or_shape(
    tmp_path: Path, kind: str, suffix: str, change: Callable[[list[int]], dict[str, object]]
) -> None:
    convert(CHECKPOINT, tmp_path / "out", CONVERTERS[kind]())
    name = Q + suffix
    rewritten(tmp_path / "out", name, **change(shape(tmp_path / "out", name)))
    with pytest.raises(CheckpointError, match=rf"tensor {name} is .*{kind} demands .*convert the folder again"):
        BagelPipeline.from_pretrained(tmp_path / "out", device="cpu", dtype="float32")


def test_an_encoding_that_the_format_lacks(tmp_path: Path) -> None:
    convert(CHECKPOINT, tmp_path / "out", CONVERTERS["nf4"]())
    manifest = tmp_path / "out" / "variant.json"
    manifest.write_text(manifest.read_text().replace('"encoding": "nf4"', '"encoding": "int8"', 1))
    with pytest.raises(CheckpointError, match="is kept as int8, which nf4 folders do not hold"):
        BagelPipeline.from_pretrained(tmp_path / "out", device="cpu", dtype="float32")


def test_dfloat11_of_another_dtype(tmp_path: Path) -> None:
    convert(CHECKPOINT, tmp_path / "out", CONVERTERS["dfloat11"]())
    name = Q.replace(".weight", ".luts")
    rewritten(tmp_path / "out", name, dtype="I8")
    with pytest.raises(CheckpointError, match=r"luts: must be torch\.uint8"):
        BagelPipeline.from_pretrained(tmp_path / "out", device="cpu", dtype="float32")


@pytest.mark.parametrize("group", ["-1", "1", "3", "64", "512", '"x"', "true", "1.5", "1e20"])
def test_a_rotation_that_the_weights_do_not_have(tmp_path: Path, group: str) -> None:
    convert(CHECKPOINT, tmp_path / "out", CONVERTERS["int8 rotated"]())
    manifest = tmp_path / "out" / "variant.json"
    text = manifest.read_text()
    assert '"rotation_group": 128' in text
    manifest.write_text(text.replace('"rotation_group": 128', f'"rotation_group": {group}'))
    with pytest.raises(CheckpointError, match=r"rotation_group of .* is .*convert the folder again"):
        BagelPipeline.from_pretrained(tmp_path / "out", device="cpu", dtype="float32")
