"""Every tensor of a BAGEL checkpoint as data: its name, shape and place in the model. No torch here.

Loading is strict against this table, converters choose what to quantise by it, and the planner adds sizes up by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from .config import BagelConfig, VaeConfig

Part = Literal["decoder", "embedding", "lm_head", "vit", "connector", "latent", "vae"]
Expert = Literal["und", "gen"]
EXPERTS: tuple[Expert, Expert] = ("und", "gen")
SUFFIX: dict[Expert, str] = {"und": "", "gen": "_moe_gen"}

FUSED: dict[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""The linears of an expert layer and the checkpoint's linears that each one stacks."""

EMBEDDING = "language_model.model.embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
LATENT_POSITIONS = "latent_pos_embed.pos_embed"
VIT_POSITIONS = "vit_pos_embed.pos_embed"


@dataclass(frozen=True)
class TensorSpec:
    """What a checkpoint must hold under `name`.

    `shape` has None where the size is read from the file (the position tables). `linear` is the short name of the
    decoder linear that this tensor is the weight of ("q", "k", "v", "o", "gate", "up", "down"), else None. `routed` is
    the number of the routed expert that it belongs to.
    """

    name: str
    shape: tuple[int | None, ...]
    part: Part
    layer: int | None = None
    expert: Expert | None = None
    linear: str | None = None
    routed: int | None = None


def only_for_pictures(spec: TensorSpec) -> bool:
    """Tensors that a checkpoint that only answers does without."""
    return spec.expert == "gen" or spec.part in ("latent", "vae")


def decoder_layer(config: BagelConfig, layer: int, expert: Expert) -> Iterator[TensorSpec]:
    """The tensors of one (layer, expert), in the order of the fused layout: norms, biases, then weights."""
    c = config.decoder
    base, s = f"language_model.model.layers.{layer}.", SUFFIX[expert]
    q, k, v = c.qkv_rows
    h, m, d = c.hidden_size, c.intermediate_size, c.head_dim
    routed = c.routed_in(layer, expert)

    def spec(name: str, *shape: int, linear: str | None = None, routed: int | None = None) -> TensorSpec:
        return TensorSpec(base + name, shape, "decoder", layer, expert, linear, routed)

    yield spec(f"input_layernorm{s}.weight", h)
    yield spec(f"self_attn.q_norm{s}.weight", d)
    yield spec(f"self_attn.k_norm{s}.weight", d)
    yield spec(f"post_attention_layernorm{s}.weight", h)
    if routed is not None:
        yield spec(f"mlp{s}.gate.weight", routed.count, h)
    for short, rows in (("q", q), ("k", k), ("v", v)):
        yield spec(f"self_attn.{short}_proj{s}.bias", rows)
    for short, rows in (("q", q), ("k", k), ("v", v)):
        yield spec(f"self_attn.{short}_proj{s}.weight", rows, h, linear=short)
    yield spec(f"self_attn.o_proj{s}.weight", h, h, linear="o")
    if routed is None:
        yield spec(f"mlp{s}.gate_proj.weight", m, h, linear="gate")
        yield spec(f"mlp{s}.up_proj.weight", m, h, linear="up")
        yield spec(f"mlp{s}.down_proj.weight", h, m, linear="down")
        return
    for number in range(routed.count):
        for short in ("gate", "up"):
            name = f"mlp{s}.experts.{number}.{short}_proj.weight"
            yield spec(name, routed.size, h, linear=short, routed=number)
    for number in range(routed.count):
        yield spec(f"mlp{s}.experts.{number}.down_proj.weight", h, routed.size, linear="down", routed=number)


@lru_cache(maxsize=4)  # opening, planning and loading a folder each ask for its table several times
def tensor_table(config: BagelConfig) -> Mapping[str, TensorSpec]:
    """All tensors of a checkpoint of this configuration, the VAE's (stored in `ae.safetensors`) included."""
    return {spec.name: spec for spec in _all(config)}


def _all(config: BagelConfig) -> Iterator[TensorSpec]:
    c, v, h = config.decoder, config.vit, config.decoder.hidden_size
    yield TensorSpec(EMBEDDING, (c.vocab_size, h), "embedding")
    for layer in range(c.num_layers):
        for expert in EXPERTS:
            yield from decoder_layer(config, layer, expert)
    for expert in EXPERTS:
        yield TensorSpec(f"language_model.model.norm{SUFFIX[expert]}.weight", (h,), "decoder", None, expert)
    yield TensorSpec(LM_HEAD, (c.vocab_size, h), "lm_head")

    yield TensorSpec(LATENT_POSITIONS, (None, h), "latent")
    for name, out, width in (
        ("vae2llm", h, config.latent_values),
        ("llm2vae", config.latent_values, h),
        ("time_embedder.mlp.0", h, 256),
        ("time_embedder.mlp.2", h, h),
    ):
        yield TensorSpec(f"{name}.weight", (out, width), "latent")
        yield TensorSpec(f"{name}.bias", (out,), "latent")

    yield TensorSpec(VIT_POSITIONS, (None, h), "connector")
    yield from _affine("connector.fc1", "connector", h, v.hidden_size)
    yield from _affine("connector.fc2", "connector", h, h)

    vit = "vit_model.vision_model."
    yield from _affine(vit + "embeddings.patch_embedding", "vit", v.hidden_size, v.patch_values)
    yield TensorSpec(vit + "embeddings.position_embedding.weight", (v.patches_per_side**2, v.hidden_size), "vit")
    for layer in range(v.num_layers):
        base = f"{vit}encoder.layers.{layer}."
        for norm in ("layer_norm1", "layer_norm2"):
            yield from _affine(base + norm, "vit", v.hidden_size)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _affine(f"{base}self_attn.{name}", "vit", v.hidden_size, v.hidden_size)
        yield from _affine(base + "mlp.fc1", "vit", v.intermediate_size, v.hidden_size)
        yield from _affine(base + "mlp.fc2", "vit", v.hidden_size, v.intermediate_size)
    yield from _affine(vit + "post_layernorm", "vit", v.hidden_size)
    yield from _vae(config.vae)


def _affine(name: str, part: Part, *shape: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", shape, part)
    yield TensorSpec(f"{name}.bias", shape[:1], part)


def _vae(c: VaeConfig) -> Iterator[TensorSpec]:
    def conv(name: str, out: int, width: int, kernel: int = 3) -> Iterator[TensorSpec]:
        yield from _affine(name, "vae", out, width, kernel, kernel)

    def res_block(name: str, width: int, out: int) -> Iterator[TensorSpec]:
        yield from _affine(name + ".norm1", "vae", width)
        yield from conv(name + ".conv1", out, width)
        yield from _affine(name + ".norm2", "vae", out)
        yield from conv(name + ".conv2", out, out)
        if width != out:
            yield from conv(name + ".nin_shortcut", out, width, 1)

    def middle(name: str, width: int) -> Iterator[TensorSpec]:
        yield from res_block(name + ".block_1", width, width)
        yield from _affine(name + ".attn_1.norm", "vae", width)
        for proj in ("q", "k", "v", "proj_out"):
            yield from conv(f"{name}.attn_1.{proj}", width, width, 1)
        yield from res_block(name + ".block_2", width, width)

    yield from conv("encoder.conv_in", c.ch, c.in_channels)
    width = c.ch
    for level, mult in enumerate(c.ch_mult):
        for block in range(c.num_res_blocks):
            yield from res_block(f"encoder.down.{level}.block.{block}", width, c.ch * mult)
            width = c.ch * mult
        if level != len(c.ch_mult) - 1:
            yield from conv(f"encoder.down.{level}.downsample.conv", width, width)
    yield from middle("encoder.mid", width)
    yield from _affine("encoder.norm_out", "vae", width)
    yield from conv("encoder.conv_out", 2 * c.z_channels, width)

    yield from conv("decoder.conv_in", width, c.z_channels)
    yield from middle("decoder.mid", width)
    for level in reversed(range(len(c.ch_mult))):
        for block in range(c.num_res_blocks + 1):
            yield from res_block(f"decoder.up.{level}.block.{block}", width, c.ch * c.ch_mult[level])
            width = c.ch * c.ch_mult[level]
        if level:
            yield from conv(f"decoder.up.{level}.upsample.conv", width, width)
    yield from _affine("decoder.norm_out", "vae", width)
    yield from conv("decoder.conv_out", c.out_ch, width)
