"""Folders of models, changed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Q = "language_model.model.layers.1.self_attn.q_proj_moe_gen.weight"


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: Path, **changed: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors of ema.safetensors."""
    tensors = {name: value.clone() for name, value in load_file(folder / "ema.safetensors").items()}
    for name, value in changed.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    (folder / "ema.safetensors").unlink()
    save_file(tensors, folder / "ema.safetensors")
