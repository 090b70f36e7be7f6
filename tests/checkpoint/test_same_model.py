"""Folders that cards may hold side by side: of one checkpoint, in whatever formats."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowmem_bagel.converters.engine.registry import convert_folder
from safetensors.torch import load_file, save_file
from support.adapters import write_adapter
from support.paths import CHECKPOINT

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.same_model import open_same
from lowmem_bagel.errors import CheckpointError

WEIGHTS = "ema.safetensors"
CHANGED = "language_model.model.layers.0.self_attn.k_proj_moe_gen.weight"


@pytest.fixture(scope="module")
def variants(variant_of: Callable[[str], Path]) -> dict[str, Path]:
    return {"source": CHECKPOINT, **{name: variant_of(name) for name in ("int8", "dfloat11")}}


@pytest.fixture
def retrained(spoilable: Path) -> Path:
    """The checkpoint with one of its weights changed by next to nothing."""
    tensors = load_file(spoilable / WEIGHTS)
    tensors[CHANGED] = tensors[CHANGED].clone()
    tensors[CHANGED][0, 0] += torch.tensor(2.0).to(tensors[CHANGED].dtype)
    save_file(tensors, spoilable / WEIGHTS)
    return spoilable


@pytest.mark.parametrize(
    ("first", "other", "known"),
    [
        ("source", "int8", r"of the same checkpoint: \d+ tensors were the same before"),
        ("int8", "source", r"of the same checkpoint: \d+ tensors were the same before"),
        ("int8", "dfloat11", r"of the same checkpoint: \d+ tensors were the same before"),
        ("source", "source", r"of the same checkpoint: \d+ tensors were the same before"),
    ],
)
def test_variants_of_one_checkpoint(variants: dict[str, Path], first: str, other: str, known: str) -> None:
    folder, found = open_same(ModelFolder.open(variants[first]), str(variants[other]))
    assert folder.path == variants[other] and re.match(known, found)


@pytest.mark.parametrize("first", ["source", "int8"])
@pytest.mark.parametrize("form", ["source", "dfloat11"])
def test_another_checkpoint_of_the_same_shape(
    variants: dict[str, Path], retrained: Path, tmp_path: Path, first: str, form: str
) -> None:
    other = retrained
    if form != "source":
        other = tmp_path / "other"
        convert_folder(retrained, other, form)
    with pytest.raises(CheckpointError, match=f"{other}: was made from another checkpoint: {CHANGED} is another"):
        open_same(ModelFolder.open(variants[first]), str(other))


def test_other_dimensions(variants: dict[str, Path], spoilable: Path) -> None:
    config = json.loads((spoilable / "llm_config.json").read_text())
    (spoilable / "llm_config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    with pytest.raises(CheckpointError, match=r"has other dimensions \(decoder\); it must be the model of"):
        open_same(ModelFolder.open(variants["int8"]), str(spoilable))


def test_what_files_do_not_tell_is_said(variants: dict[str, Path], spoilable: Path) -> None:
    """The same weights in another dtype: their bytes differ in any case."""
    tensors = {name: tensor.float() for name, tensor in load_file(spoilable / WEIGHTS).items()}
    save_file(tensors, spoilable / WEIGHTS)
    assert open_same(ModelFolder.open(variants["int8"]), str(spoilable))[1].endswith("its files do not say")


def test_adapters_are_in_no_other_folder(variants: dict[str, Path], tmp_path: Path) -> None:
    source = ModelFolder.open(CHECKPOINT)
    adapter = write_adapter(tmp_path / "adapter", CHECKPOINT, [CHANGED])
    with pytest.raises(CheckpointError, match=r"cannot have the adapters .*; convert the checkpoint with --lora"):
        open_same(source.adapted([str(adapter)]), str(variants["int8"]))
