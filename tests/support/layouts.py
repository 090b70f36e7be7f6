"""Folders as people have them, made of the embedded demo checkpoint: the same weights in other files and under other
names, or less, or something else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_bagel.demo_checkpoint import FOLDER
from support.paths import CHECKPOINT

PATCHES = "vit_model.vision_model.embeddings.patch_embedding.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
VIT = ("vit_model.", "connector.", "vit_pos_embed.")
LATENT = ("vae2llm.", "llm2vae.", "time_embedder.", "latent_pos_embed.")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


@dataclass
class Parts:
    """A checkpoint in memory, to be changed and written; `files` are small ones, by name."""

    tensors: dict[str, Tensor]
    vae: dict[str, Tensor]
    configs: dict[str, dict[str, Any]]
    files: dict[str, bytes] = field(default_factory=dict)
    metadata: dict[str, str] | None = None

    def write(self, folder: Path, weights: str = "ema.safetensors", vae: str = "ae.safetensors") -> Path:
        """Files whose content is empty are left out."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.tensors:
            save_file(whole(self.tensors), folder / weights, self.metadata)
        if self.vae:
            (folder / vae).parent.mkdir(exist_ok=True)
            save_file(whole(self.vae), folder / vae)
        for name, values in self.configs.items():
            (folder / name).write_text(json.dumps(values))
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder

    def without(self, *prefixes: str) -> Parts:
        self.tensors = {name: value for name, value in self.tensors.items() if not name.startswith(prefixes)}
        return self

    def renamed(self, rename: Callable[[str], str]) -> Parts:
        self.tensors = {rename(name): value for name, value in self.tensors.items()}
        return self

    def to(self, dtype: torch.dtype, chosen: Callable[[str, Tensor], bool] = lambda name, value: True) -> Parts:
        self.tensors = {n: value.to(dtype) if chosen(n, value) else value for n, value in self.tensors.items()}
        return self


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: contiguous, none sharing memory."""
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def demo() -> Parts:
    """The embedded demo checkpoint."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(FOLDER.glob("model-*.safetensors")):
        tensors |= load_file(shard)
    names = ("llm_config.json", "vit_config.json", "ae_config.json", "resize_config.json", "config.json")
    configs = {name: json.loads((FOLDER / name).read_text()) for name in names}
    files = {name: (FOLDER / name).read_bytes() for name in TOKENIZER}
    return Parts(tensors, load_file(FOLDER / "ae.safetensors"), configs, files)


def golden() -> Parts:
    """The golden checkpoint: three layers of random weights."""
    names = ("llm_config.json", "vit_config.json", "ae_config.json")
    configs = {name: json.loads((CHECKPOINT / name).read_text()) for name in names}
    files = {name: (CHECKPOINT / name).read_bytes() for name in TOKENIZER}
    return Parts(load_file(CHECKPOINT / "ema.safetensors"), load_file(CHECKPOINT / "ae.safetensors"), configs, files)


def in_shards(folder: Path, stem: str = "model", shards: int = 3, index: str | None = "") -> Path:
    """A folder's ema.safetensors as numbered shards, by an index of the usual name, of another, or (None) without."""
    tensors = load_file(folder / "ema.safetensors")
    (folder / "ema.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::shards]}
        save_file(whole(part), folder / name)
        weight_map |= dict.fromkeys(part, name)
    if index is not None:
        content = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / (index or f"{stem}.safetensors.index.json")).write_text(content)
    return folder


def nested(parts: Parts, vit_layers: int) -> Parts:
    """The configurations inside config.json, as `save_pretrained` writes them."""
    inner = {name: parts.configs.pop(f"{name}.json") for name in ("llm_config", "vit_config")}
    inner["vae_config"] = parts.configs.pop("ae_config.json")
    inner["vit_config"]["num_hidden_layers"] = vit_layers
    whole_config = {"model_type": "bagel", "architectures": ["Bagel"], "latent_patch_size": 2, **inner}
    parts.configs["config.json"] = whole_config
    return parts


def convolved(parts: Parts, patch: int = 14) -> Parts:
    """The patch embedding as the convolution that SigLIP has."""
    weight = parts.tensors[PATCHES]
    parts.tensors[PATCHES] = weight.view(-1, patch, patch, 3).permute(0, 3, 1, 2)
    return parts


def whole_siglip(parts: Parts) -> Parts:
    """The tower with the last layer and the head that BAGEL leaves out."""
    base = "vit_model.vision_model."
    last = {n: v for n, v in parts.tensors.items() if n.startswith(f"{base}encoder.layers.3.")}
    parts.tensors |= {name.replace("layers.3.", "layers.4."): torch.full_like(v, 9.0) for name, v in last.items()}
    parts.tensors |= {f"{base}head.probe": torch.ones(1, 1, 128), f"{base}head.layernorm.weight": torch.ones(128)}
    return parts


def with_buffers(parts: Parts) -> Parts:
    parts.tensors |= {
        "vit_model.vision_model.embeddings.position_ids": torch.arange(64)[None],
        "language_model.model.rotary_emb.inv_freq": torch.ones(32),
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32),
    }
    return parts


def routed(
    parts: Parts, count: int = 16, active: int = 8, layers: Sequence[int] = (1, 2, 3, 4), gates: float = 0.0
) -> Parts:
    """The gen MLPs of some layers cut into routed experts, as BAGEL-MoE's were, with random routers of size `gates`:
    with none, all experts together are the MLP that was cut."""
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        mlp = f"language_model.model.layers.{layer}.mlp_moe_gen."
        for short in ("gate", "up", "down"):
            weight = parts.tensors.pop(f"{mlp}{short}_proj.weight")
            for number, part in enumerate(weight.chunk(count, dim=1 if short == "down" else 0)):
                parts.tensors[f"{mlp}experts.{number}.{short}_proj.weight"] = part
        router = gates * torch.randn(count, weight.shape[0], generator=generator)
        parts.tensors[f"{mlp}gate.weight"] = router.to(weight.dtype)
    parts.configs["llm_config.json"] |= {"num_experts": count, "num_experts_per_tok": active}
    return parts


def diffusers_vae(parts: Parts) -> Parts:
    """The autoencoder under diffusers' names."""
    parts.vae = {_diffusers(name, levels=4): value for name, value in parts.vae.items()}
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    flat = {n: v[:, :, 0, 0] for n, v in parts.vae.items() if v.dim() == 4 and any(f".{p}." in n for p in projections)}
    parts.vae |= flat
    return parts


def _diffusers(name: str, levels: int) -> str:
    side, first, *rest = name.split(".")
    attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    if first in ("down", "up"):
        level = int(rest[0]) if first == "down" else levels - 1 - int(rest[0])
        if rest[1] == "block":
            inner = "conv_shortcut" if rest[3] == "nin_shortcut" else rest[3]
            return f"{side}.{first}_blocks.{level}.resnets.{rest[2]}.{inner}.{rest[-1]}"
        return f"{side}.{first}_blocks.{level}.{first}samplers.0.conv.{rest[-1]}"
    if first == "mid" and rest[0] == "attn_1":
        return f"{side}.mid_block.attentions.0.{attention[rest[1]]}.{rest[-1]}"
    if first == "mid":
        return f"{side}.mid_block.resnets.{int(rest[0][-1]) - 1}.{rest[1]}.{rest[-1]}"
    return f"{side}.conv_norm_out.{rest[-1]}" if first == "norm_out" else name


def comfy(parts: Parts) -> Parts:
    """All in the metadata of one file, and no tokenizer."""
    inner = {name: parts.configs.pop(f"{name}.json") for name in ("llm_config", "vit_config", "ae_config")}
    inner["resize_config"] = parts.configs.pop("resize_config.json")
    parts.configs.clear()
    parts.files.clear()
    tokens = {"bos_token_id": 508, "eos_token_id": 509, "start_of_image": 510, "end_of_image": 511}
    parts.metadata = {"comfyui_bagel": json.dumps({**inner, "special_tokens": tokens, "tokenizer": "sha256:0"})}
    return parts


def in_fp8(parts: Parts, scale: str | None = None, kind: str = "tensor", mark: bool = False) -> Parts:
    """Matrices of the decoder's layers in FP8, with scales of that name and kind."""
    for name, value in list(parts.tensors.items()):
        if ".layers." not in name or not name.startswith("language_model") or value.dim() != 2:
            continue
        scales = torch.ones(()) if scale is None else _scales(value.float(), kind)
        parts.tensors[name] = (value.float() / scales).to(torch.float8_e4m3fn)
        if scale is not None:
            stored = scales.reshape(-1) if kind == "row" else scales
            parts.tensors[f"{name.removesuffix('.weight')}.{scale}"] = stored
    if mark:
        parts.tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return parts


def _scales(value: Tensor, kind: str) -> Tensor:
    largest = value.abs().amax(dim=1, keepdim=True) if kind == "row" else value.abs().max()
    return largest / 448


def dequantized(parts: Parts) -> Parts:
    """What an FP8 checkpoint's weights stand for, in bf16."""
    tensors = dict(parts.tensors)
    for name, value in parts.tensors.items():
        if value.dtype != torch.float8_e4m3fn:
            continue
        tensors.pop(name)
        if name == "scaled_fp8":
            continue
        module = name.removesuffix(".weight")
        scale = next(
            (tensors.pop(key) for key in list(tensors) if key.startswith(f"{module}.") and "scale" in key), None
        )
        scaled = value.float() if scale is None else value.float() * (scale[:, None] if scale.dim() == 1 else scale)
        tensors[name] = scaled.bfloat16()
    parts.tensors = tensors
    return parts


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))
