"""LoRA adapters as PEFT saves them, with random factors that fit a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import tensor_table

GEN = ("q", "k", "v", "o", "gate", "up", "down")
PREFIX = "base_model.model."
"""Before the names of the language model's modules, which was trained alone."""


def weights_of(folder: Path, expert: str = "gen", shorts: Iterable[str] = GEN) -> list[str]:
    """Names of an expert's decoder weights."""
    wanted = set(shorts)
    table = tensor_table(ModelFolder.open(folder).config).values()
    return [spec.name for spec in table if spec.expert == expert and spec.linear in wanted]


def write_adapter(
    out: Path,
    folder: Path,
    names: Iterable[str],
    *,
    rank: int = 4,
    seed: int = 0,
    size: float = 0.05,
    dtype: torch.dtype = torch.float32,
    ranks: Mapping[str, int] | None = None,
    **settings: Any,
) -> Path:
    """Factors of size `size` for weights of a folder; `ranks` of single ones, by the end of their module's name."""
    generator = torch.Generator().manual_seed(seed)
    table = tensor_table(ModelFolder.open(folder).config)
    tensors: dict[str, Tensor] = {}
    for name in names:
        rows, width = (n or 0 for n in table[name].shape)
        module = name.removesuffix(".weight")
        own = next((r for end, r in (ranks or {}).items() if module.endswith(end)), rank)
        called = PREFIX + module.removeprefix("language_model.")
        tensors[f"{called}.lora_A.weight"] = (torch.randn(own, width, generator=generator) * size).to(dtype)
        tensors[f"{called}.lora_B.weight"] = (torch.randn(rows, own, generator=generator) * size).to(dtype)
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (out / "adapter_config.json").write_text(json.dumps(config | settings))
    return out


def spoiled(adapter: Path, tensors: Mapping[str, Tensor | None]) -> Path:
    """The adapter with tensors added, or left out where None."""
    held: dict[str, Tensor | None] = {**load_file(adapter / "adapter_model.safetensors"), **tensors}
    save_file({k: v for k, v in held.items() if v is not None}, adapter / "adapter_model.safetensors")
    return adapter
