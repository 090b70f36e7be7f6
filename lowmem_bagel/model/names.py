"""Which stored tensors make up each tensor of the built model, as data.

A fused linear is the row-wise concatenation of the checkpoint's linears, so each entry is a list of stored names.
"""

from __future__ import annotations

from ..checkpoint.config import BagelConfig, DecoderConfig
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
ROUTED = ("gate_up", "down")
"""The linears that routed experts have each of their own."""


def linear_module(layer: int, expert: Expert, short: str) -> str:
    """The checkpoint's module name of one decoder linear; `short` is one of q, k, v, o, gate, up, down."""
    base, suffix = f"language_model.model.layers.{layer}.", SUFFIX[expert]
    if short in ("q", "k", "v", "o"):
        return f"{base}self_attn.{short}_proj{suffix}"
    return f"{base}mlp{suffix}.{short}_proj"


def stacked_modules(decoder: DecoderConfig, layer: int, expert: Expert, fused: str) -> list[str]:
    """The checkpoint's modules that a fused linear (a key of FUSED) stacks by rows; those of routed experts one expert
    after the other."""
    routed = decoder.routed_in(layer, expert)
    if routed is None or fused not in ROUTED:
        return [linear_module(layer, expert, short) for short in FUSED[fused]]
    experts = f"language_model.model.layers.{layer}.mlp{SUFFIX[expert]}.experts"
    return [f"{experts}.{number}.{short}_proj" for number in range(routed.count) for short in FUSED[fused]]


def expert_vectors(decoder: DecoderConfig, layer: int, expert: Expert) -> dict[str, tuple[str, ...]]:
    """Norms, biases and router of an `ExpertLayer`: parameter path -> stored names, alike in every variant."""
    base, suffix = f"language_model.model.layers.{layer}.", SUFFIX[expert]
    routed = decoder.routed_in(layer, expert) is not None
    router = {"router": (f"{base}mlp{suffix}.gate.weight",)} if routed else {}
    return router | {
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
            names |= {base + path: stored for path, stored in expert_vectors(config.decoder, layer, expert).items()}
            for fused in FUSED:
                modules = stacked_modules(config.decoder, layer, expert, fused)
                names[f"{base}{fused}.weight"] = tuple(f"{module}.weight" for module in modules)
    return names
