"""Which stored tensors make up each tensor of the built model, as data.

A fused linear is the row-wise concatenation of the checkpoint's linears, so each entry is a list of stored names.
"""

from __future__ import annotations

from ..checkpoint.config import BagelConfig
from ..checkpoint.tensors import (
    EMBEDDING,
    EXPERTS,
    FUSED,
    LATENT_POSITIONS,
    LM_HEAD,
    SUFFIX,
    VIT_POSITIONS,
    Expert,
    tensor_table,
)

VIT_PREFIX = "vit_model.vision_model."


def linear_module(layer: int, expert: Expert, short: str) -> str:
    """The checkpoint's module name of one decoder linear; `short` is one of q, k, v, o, gate, up, down."""
    base, suffix = f"language_model.model.layers.{layer}.", SUFFIX[expert]
    if short in ("q", "k", "v", "o"):
        return f"{base}self_attn.{short}_proj{suffix}"
    return f"{base}mlp{suffix}.{short}_proj"


def expert_vectors(layer: int, expert: Expert) -> dict[str, tuple[str, ...]]:
    """Norms and biases of an `ExpertLayer`: parameter path -> stored names. They are stored alike in every variant."""
    base, suffix = f"language_model.model.layers.{layer}.", SUFFIX[expert]
    return {
        "input_norm": (f"{base}input_layernorm{suffix}.weight",),
        "post_norm": (f"{base}post_attention_layernorm{suffix}.weight",),
        "q_norm": (f"{base}self_attn.q_norm{suffix}.weight",),
        "k_norm": (f"{base}self_attn.k_norm{suffix}.weight",),
        "qkv.bias": tuple(f"{linear_module(layer, expert, s)}.bias" for s in FUSED["qkv"]),
    }


def vision_tensors(config: BagelConfig) -> dict[str, tuple[str, ...]]:
    """Tensors of `Vision`: parameter path -> stored names."""
    names: dict[str, tuple[str, ...]] = {"positions": (VIT_POSITIONS,)}
    for name, spec in tensor_table(config).items():
        if spec.part == "vit":
            names["vit." + name.removeprefix(VIT_PREFIX)] = (name,)
        elif spec.part == "connector" and name != VIT_POSITIONS:
            names[name] = (name,)
    return names


def latent_tensors(config: BagelConfig) -> dict[str, tuple[str, ...]]:
    """Tensors of `Bagel` that pictures out need, the decoder aside: parameter path -> stored names."""
    specs = tensor_table(config).values()
    plain: dict[str, tuple[str, ...]] = {
        spec.name: (spec.name,) for spec in specs if spec.part == "latent" and spec.name != LATENT_POSITIONS
    }
    return {"latent_positions": (LATENT_POSITIONS,)} | plain


def norm_tensor(expert: Expert) -> tuple[str, ...]:
    """The stored name of an expert's final norm."""
    return (f"language_model.model.norm{SUFFIX[expert]}.weight",)


def dense_tensors(config: BagelConfig) -> dict[str, tuple[str, ...]]:
    """All of `Bagel` with dense linears: parameter path -> stored names (for training and export)."""
    names: dict[str, tuple[str, ...]] = {"embed_tokens": (EMBEDDING,), "lm_head.weight": (LM_HEAD,)}
    names |= latent_tensors(config)
    names |= {f"vision.{path}": stored for path, stored in vision_tensors(config).items()}
    names |= {f"decoder.norm.{expert}": norm_tensor(expert) for expert in EXPERTS}
    for layer in range(config.decoder.num_layers):
        for expert in EXPERTS:
            base = f"decoder.layers.{layer}.{expert}."
            names |= {base + path: stored for path, stored in expert_vectors(layer, expert).items()}
            for fused, shorts in FUSED.items():
                stored = tuple(f"{linear_module(layer, expert, s)}.weight" for s in shorts)
                names[f"{base}{fused}.weight"] = stored
    return names
