"""Random weights at a true shape, in memory or on disk: for measuring without the 29 GB checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lowmem_bagel.checkpoint.config import BagelConfig, DecoderConfig, VaeConfig, VitConfig
from lowmem_bagel.checkpoint.folder import MODEL_FILE, VAE_FILE, ModelFolder
from lowmem_bagel.checkpoint.safetensors_file import SafetensorsFile, TensorEntry
from lowmem_bagel.checkpoint.tensors import LATENT_POSITIONS, VIT_POSITIONS, TensorSpec, tensor_table
from lowmem_bagel.demo_checkpoint import FOLDER as TOKENIZER_FOLDER
from lowmem_bagel.errors import SettingError

if TYPE_CHECKING:
    import torch

WEIGHT_STD = 0.02
LARGE = 1 << 28
"""Values above which a matrix is put together on the host, so that making it takes no memory of a limited card."""

SHAPES: dict[str, BagelConfig] = {
    "bagel-7b": BagelConfig(
        DecoderConfig(3584, 28, 28, 4, 18944, 152064, 1e6, 1e-6),
        VitConfig(1152, 26, 16, 4304, 14, 980, 1e-6),
        VaeConfig(),
    ),
    "tiny": BagelConfig(
        DecoderConfig(256, 2, 4, 2, 512, 512, 1e6, 1e-6),
        VitConfig(64, 2, 4, 112, 14, 980, 1e-6),
        VaeConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1),
    ),
}
"""The published shape, and a small one for trying a benchmark out on a CPU."""

POSITION_SIDES = {LATENT_POSITIONS: 64, VIT_POSITIONS: 70}


def shape_of(spec: TensorSpec) -> tuple[int, ...]:
    """A tensor's shape with the position tables at their published sizes."""
    return tuple(POSITION_SIDES[spec.name] ** 2 if size is None else size for size in spec.shape)


def make_tensor(spec: TensorSpec, device: str) -> torch.Tensor:
    """Norm weights near 1, everything else N(0, 0.02); bf16, the VAE fp32, as a checkpoint stores them.

    Convolutions of the VAE are scaled by their width instead, so that pictures stay finite.
    """
    import torch

    shape = shape_of(spec)
    dtype = torch.float32 if spec.part == "vae" else torch.bfloat16
    if math.prod(shape) > LARGE:
        matrix = torch.empty(shape, dtype=dtype)
        for block in matrix.split(LARGE // shape[-1]):
            block.copy_(torch.empty_like(block, device=device).normal_(0.0, WEIGHT_STD))
        return matrix
    value = torch.empty(shape, dtype=dtype, device=device)
    if "norm" in spec.name and len(shape) == 1 and spec.name.endswith(".weight"):
        return value.normal_(1.0, WEIGHT_STD)
    if len(shape) == 4:
        return value.normal_(0.0, 1 / math.sqrt(math.prod(shape[1:])))
    return value.normal_(0.0, WEIGHT_STD)


class SyntheticFile:
    """Stands for a safetensors file: made-up headers, and tensors drawn when they are read."""

    def __init__(self, config: BagelConfig, device: str) -> None:
        self.path = Path("synthetic.safetensors")
        self.specs = tensor_table(config)
        self.device = device
        self.entries: dict[str, TensorEntry] = {}
        offset = 0
        for name, spec in self.specs.items():
            shape, dtype, size = (shape_of(spec), "F32", 4) if spec.part == "vae" else (shape_of(spec), "BF16", 2)
            self.entries[name] = TensorEntry(name, dtype, shape, offset, math.prod(shape) * size)
            offset += self.entries[name].nbytes

    def tensor(self, name: str) -> torch.Tensor:
        return make_tensor(self.specs[name], self.device)


def synthetic_folder(shape: str, device: str) -> ModelFolder:
    """A model folder of random weights that exists in memory alone. Its tokenizer is the demo checkpoint's.

    Raises:
        SettingError: an unknown shape.
    """
    if shape not in SHAPES:
        raise SettingError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")
    file = cast(SafetensorsFile, SyntheticFile(SHAPES[shape], device))
    return ModelFolder(TOKENIZER_FOLDER, SHAPES[shape], "source", None, [file])


def write_checkpoint(shape: str, out: Path, device: str, seed: int = 0) -> None:
    """Write random weights as a checkpoint in the published layout (29.6 GB for bagel-7b)."""
    import torch

    config = SHAPES[shape]
    out.mkdir(parents=True)
    torch.manual_seed(seed)
    specs = tensor_table(config)
    _write_file(out / MODEL_FILE, [s for s in specs.values() if s.part != "vae"], device)
    _write_file(out / VAE_FILE, [s for s in specs.values() if s.part == "vae"], device)
    for name, values in config_files(config).items():
        (out / name).write_text(json.dumps(values, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(TOKENIZER_FOLDER / name, out / name)


def _write_file(path: Path, specs: list[TensorSpec], device: str) -> None:
    """A safetensors file written tensor by tensor, so that no more than one is in memory."""
    header: dict[str, Any] = {}
    offset = 0
    for spec in specs:
        shape, vae = shape_of(spec), spec.part == "vae"
        end = offset + math.prod(shape) * (4 if vae else 2)
        header[spec.name] = {"dtype": "F32" if vae else "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in _bytes(specs, device):
            file.write(chunk)


def _bytes(specs: list[TensorSpec], device: str) -> Iterator[memoryview]:
    import torch

    for spec in specs:
        flat = make_tensor(spec, device).cpu().contiguous().view(-1).view(torch.uint8)
        yield flat.numpy().data


def config_files(config: BagelConfig) -> dict[str, dict[str, Any]]:
    """The JSON files of a checkpoint folder that give this configuration."""
    c, v, a = config.decoder, config.vit, config.vae
    return {
        "llm_config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": c.hidden_size,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            "intermediate_size": c.intermediate_size,
            "vocab_size": c.vocab_size,
            "rope_theta": c.rope_theta,
            "rms_norm_eps": c.rms_norm_eps,
            "tie_word_embeddings": False,
        },
        "vit_config.json": {
            "model_type": "siglip_vision_model",
            "hidden_size": v.hidden_size,
            "num_hidden_layers": v.num_layers + 1,
            "num_attention_heads": v.num_heads,
            "intermediate_size": v.intermediate_size,
            "patch_size": v.patch_size,
            "image_size": v.image_size,
            "layer_norm_eps": v.layer_norm_eps,
        },
        "ae_config.json": {
            "in_channels": a.in_channels,
            "out_ch": a.out_ch,
            "ch": a.ch,
            "ch_mult": list(a.ch_mult),
            "num_res_blocks": a.num_res_blocks,
            "z_channels": a.z_channels,
            "scale_factor": a.scale_factor,
            "shift_factor": a.shift_factor,
        },
        "config.json": {"model_type": "bagel"},
        "generation_config.json": {},
        "preprocessor_config.json": {},
    }
