"""The demo checkpoint's dimensions, and the JSON files that say them."""

from __future__ import annotations

import json
from pathlib import Path

from lowmem_bagel.checkpoint.config import BagelConfig, DecoderConfig, ResizeRule, VaeConfig, VitConfig

from .tokens import VOCAB_SIZE

GRID = 8
"""Latent tokens and ViT patches a side of the largest picture, and the side of both position tables."""
VAE_RESIZE = ResizeRule(max_side=128, min_side=64, stride=16)
VIT_RESIZE = ResizeRule(max_side=112, min_side=56, stride=14)


def demo_config(scale: float = 1.0, shift: float = 0.0) -> BagelConfig:
    """The architecture; scale and shift of the latents are measured on the trained autoencoder."""
    return BagelConfig(
        decoder=DecoderConfig(256, 6, 4, 2, 512, VOCAB_SIZE, 1e6, 1e-6),
        vit=VitConfig(128, 4, 4, 384, 14, 14 * GRID, 1e-6),
        vae=VaeConfig(3, 3, 32, (1, 1, 2, 2), 1, 16, scale, shift),
        vae_resize=VAE_RESIZE,
        vit_resize=VIT_RESIZE,
    )


def write_configs(config: BagelConfig, folder: Path, special: dict[str, int]) -> None:
    """All JSON files of the published layout but the tokenizer's; `special` gives the special tokens' ids."""
    d, v, a = config.decoder, config.vit, config.vae
    files = {
        "llm_config.json": {
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": d.vocab_size,
            "hidden_size": d.hidden_size, "intermediate_size": d.intermediate_size,
            "num_hidden_layers": d.num_layers, "num_attention_heads": d.num_heads,
            "num_key_value_heads": d.num_kv_heads, "hidden_act": "silu", "max_position_embeddings": 32768,
            "rms_norm_eps": d.rms_norm_eps, "rope_theta": d.rope_theta, "tie_word_embeddings": False,
            "initializer_range": 0.02, "attention_dropout": 0.0, "bos_token_id": special["<|im_start|>"],
            "eos_token_id": special["<|im_end|>"], "use_sliding_window": False, "torch_dtype": "bfloat16",
        },
        "vit_config.json": {
            "model_type": "siglip_vision_model", "hidden_size": v.hidden_size,
            "intermediate_size": v.intermediate_size, "num_hidden_layers": v.num_layers + 1,
            "num_attention_heads": v.num_heads, "num_channels": 3, "image_size": v.image_size,
            "patch_size": v.patch_size, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": v.layer_norm_eps,
            "attention_dropout": 0.0,
        },
        "ae_config.json": {
            "resolution": config.vae_resize.max_side, "in_channels": a.in_channels, "downsample": a.downsample,
            "ch": a.ch, "out_ch": a.out_ch, "ch_mult": list(a.ch_mult), "num_res_blocks": a.num_res_blocks,
            "z_channels": a.z_channels, "scale_factor": a.scale_factor, "shift_factor": a.shift_factor,
        },
        "resize_config.json": {
            name: {"max_side": rule.max_side, "min_side": rule.min_side, "stride": rule.stride}
            for name, rule in (("vae", config.vae_resize), ("vit", config.vit_resize))
        },
        "config.json": {"architectures": ["BagelForConditionalGeneration"], "model_type": "bagel"},
        "generation_config.json": {
            "bos_token_id": special["<|endoftext|>"], "eos_token_id": special["<|im_end|>"], "do_sample": False,
        },
        "preprocessor_config.json": {
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "patch_size": v.patch_size,
        },
    }  # fmt: skip
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
