"""A variant whose encoded weights are not stored as their format declares is refused before anything multiplies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import CheckpointError

CopyOf = Callable[[str], Path]
Q = "language_model.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def copy_of(variant_of: Callable[[str], Path], tmp_path: Path) -> CopyOf:
    """Of a variant, to be damaged."""
    return lambda kind: Path(shutil.copytree(variant_of(kind), tmp_path / "out"))


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
    copy_of: CopyOf, kind: str, suffix: str, change: Callable[[list[int]], dict[str, object]]
) -> None:
    folder, name = copy_of(kind), Q + suffix
    rewritten(folder, name, **change(shape(folder, name)))
    with pytest.raises(CheckpointError, match=rf"tensor {name} is .*{kind} demands .*convert the folder again"):
        BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32")


def test_an_encoding_that_the_format_lacks(copy_of: CopyOf) -> None:
    folder = copy_of("nf4")
    manifest = folder / "variant.json"
    manifest.write_text(manifest.read_text().replace('"encoding": "nf4"', '"encoding": "int8"', 1))
    with pytest.raises(CheckpointError, match="is kept as int8, which nf4 folders do not hold"):
        BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32")


def test_dfloat11_of_another_dtype(copy_of: CopyOf) -> None:
    folder, name = copy_of("dfloat11"), Q.replace(".weight", ".luts")
    rewritten(folder, name, dtype="I8")
    with pytest.raises(CheckpointError, match=r"luts: must be torch\.uint8"):
        BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("group", ["-1", "1", "3", "64", "512", '"x"', "true", "1.5", "1e20"])
def test_a_rotation_that_the_weights_do_not_have(copy_of: CopyOf, group: str) -> None:
    folder = copy_of("int8 rotated")
    manifest = folder / "variant.json"
    text = manifest.read_text()
    assert '"rotation_group": 128' in text
    manifest.write_text(text.replace('"rotation_group": 128', f'"rotation_group": {group}'))
    with pytest.raises(CheckpointError, match=r"rotation_group of .* is .*convert the folder again"):
        BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32")
