"""Writing trained weights in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lowmem_bagel.checkpoint.config import BagelConfig
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.tensors import tensor_table
from lowmem_bagel.model.bagel import Bagel
from lowmem_bagel.model.names import dense_tensors
from lowmem_bagel.model.vae import Vae

from .forward import new_bagel
from .layout import GRID

SHARD_BYTES = 12_000_000
"""Several shards with an index, as large checkpoints have."""


def stored_tensors(bagel: Bagel, config: BagelConfig) -> dict[str, Tensor]:
    """The checkpoint's tensors by name: the fused matrices of the model taken apart."""
    table = tensor_table(config)
    parameters = dict(bagel.named_parameters())
    stored: dict[str, Tensor] = {}
    for path, names in dense_tensors(config).items():
        rows = [table[name].shape[0] or parameters[path].shape[0] for name in names]
        for name, part in zip(names, parameters[path].detach().split(rows), strict=True):
            stored[name] = part
    return stored


def export_checkpoint(bagel: Bagel, vae: Vae, config: BagelConfig, folder: Path) -> None:
    """Weights in bfloat16 shards with an index, and the autoencoder in float16.

    float16 keeps three bits more of the autoencoder's weights than bfloat16, and float32 would take the checkpoint
    over 20 MB.
    """
    trained = stored_tensors(bagel, config)
    weights = {name: tensor.to(torch.bfloat16).cpu().contiguous() for name, tensor in trained.items()}
    autoencoder = {name: tensor.detach().half().cpu().contiguous() for name, tensor in vae.state_dict().items()}
    assert set(weights) | set(autoencoder) == set(tensor_table(config)), "names differ from the format's"
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in weights.values())
    record = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    save_file(autoencoder, folder / "ae.safetensors", metadata={"format": "pt"})


def load_checkpoint(folder: Path, device: torch.device) -> tuple[Bagel, Vae, BagelConfig]:
    """An exported checkpoint as float32 modules, the decoder trainable: the inverse of `export_checkpoint`."""
    source = ModelFolder.open(folder)
    config = source.config
    bagel, vae = new_bagel(config, device, GRID), Vae(config.vae).to(device)
    parameters = dict(bagel.named_parameters())
    with torch.no_grad():
        for path, names in dense_tensors(config).items():
            parameters[path].copy_(torch.cat([source.tensor(name).float() for name in names]))
        for name, tensor in vae.state_dict().items():
            tensor.copy_(source.tensor(name))
    return bagel, vae.requires_grad_(False), config
