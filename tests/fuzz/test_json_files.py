"""Damaged and hostile JSON files of a model folder: opened, added up and planned, or refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from support.fuzz import fuzz, mutated_json
from support.paths import CHECKPOINT

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tokenizer import BagelTokenizer
from lowmem_bagel.formats.summary import summarise
from lowmem_bagel.planner.facts import ModelFacts

INPUTS = 80


def linked(source: Path, folder: Path) -> Path:
    """A folder whose files are those of another one, until they are replaced."""
    folder.mkdir()
    for path in source.iterdir():
        try:
            os.link(path, folder / path.name)
        except OSError:  # on another file system
            shutil.copyfile(path, folder / path.name)
    return folder


def replaced(path: Path, data: bytes) -> None:
    """Writes a file anew, whatever else its old content belongs to."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def looked_at(folder: Path) -> None:
    """All that is found out of a folder without reading weights."""
    summary = summarise(folder)
    json.dumps(summary.to_json())
    if summary.manifest is not None:
        json.dumps(summary.to_json(tensors=True))
    ModelFacts.of_folder(ModelFolder.open(folder))


@pytest.fixture(scope="module")
def folders(variant_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for name in ("nf4", "dfloat11"):
        shutil.copytree(variant_of(name), root / name)
    published = linked(root / "dfloat11", root / "published")
    (published / "variant.json").unlink()
    return root


FILES = [
    ("source", "llm_config.json", looked_at),
    ("source", "vit_config.json", looked_at),
    ("source", "ae_config.json", looked_at),
    ("source", "resize_config.json", looked_at),
    ("source", "config.json", looked_at),
    ("source", "tokenizer.json", BagelTokenizer),
    ("published", "config.json", looked_at),
    ("published", "model.safetensors.index.json", looked_at),
    ("nf4", "variant.json", looked_at),
]
INVENTED = {
    "resize_config.json": {
        "vae": {"max_side": 128, "min_side": 32, "stride": 16},
        "vit": {"max_side": 112, "min_side": 28, "stride": 14},
    },
    "config.json": {"llm_config": {"hidden_size": 128}, "vit_config": {}, "model_type": "bagel"},
    "ae_config.json": {
        "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4,
        "scale_factor": 0.3, "shift_factor": 0.1,
    },
}  # fmt: skip
"""Where the checkpoint has no such file."""


@pytest.mark.parametrize(("kind", "name", "look"), FILES, ids=[f"{kind}-{name}" for kind, name, _ in FILES])
def test_files(folders: Path, tmp_path: Path, kind: str, name: str, look: Callable[[Path], object]) -> None:
    folder = linked(CHECKPOINT if kind == "source" else folders / kind, tmp_path / "model")
    path = folder / name
    text = path.read_bytes() if path.exists() else json.dumps(INVENTED[name]).encode()

    def make(random: Random) -> Callable[[], object]:
        replaced(path, mutated_json(random, text))
        return lambda: look(folder)

    fuzz(f"{name} ({kind})", make, INPUTS, tmp_path)
