"""Settings that change what a model computes, in every spelling that known software writes. No torch here.

What BAGEL's architecture leaves open is honoured; what it does not have is refused by name, because a model that runs
with another arithmetic than it was trained with is wrong in a way that nobody sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import ConfigError
from .sections import Section

TANH_GELU = ("gelu_pytorch_tanh", "gelu_tanh", "gelu_new", "gelu_fast")
EPS = ("rms_norm_eps", "rms_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon")
VIT_EPS = ("layer_norm_eps", "layer_norm_epsilon", "norm_eps")
THETA = ("rope_theta", "rotary_emb_base", "rotary_base", "rope_base")
ROPE = ("rope_parameters", "rope_scaling")
"""Newer and older transformers."""
ROPE_THETA, RMS_NORM_EPS, LAYER_NORM_EPS = 1e6, 1e-6, 1e-6
"""The published model's, which hold where no spelling of them is there."""

Fixed = tuple[Sequence[str], Sequence[object], str]
"""Spellings of a setting, the values that it may have, and what they stand for."""

DECODER: Sequence[Fixed] = (
    (("hidden_act", "hidden_activation", "activation_function"), ("silu", "swish"), "BAGEL's MLP is gated by silu"),
    (("qk_norm", "use_qk_norm", "qk_layernorm"), (True,), "BAGEL's queries and keys are normalised"),
    (("attention_bias", "qkv_bias", "use_qkv_bias"), (True,), "BAGEL's q, k and v have a bias"),
    (("attention_out_bias", "o_bias", "mlp_bias", "use_bias"), (False,), "BAGEL has no such bias"),
    (("layer_module",), ("Qwen2MoTDecoderLayer",), "BAGEL's layers are Qwen2MoTDecoderLayer"),
    (("use_sliding_window",), (False,), "BAGEL's attention sees everything"),
    (("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "attention_multiplier"), (), "BAGEL has none"),
    (
        (
            "logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "partial_rotary_factor",
            "rotary_pct",
        ),
        (1, 1.0),
        "BAGEL has none but 1",
    ),
    (("rope_interleaved", "use_mrope", "scale_embedding"), (False,), "BAGEL's rope is Qwen2's"),
)  # fmt: skip
VIT: Sequence[Fixed] = (
    (("hidden_act", "hidden_activation"), TANH_GELU, "BAGEL's vision tower has gelu by tanh"),
    (("num_channels", "in_channels"), (3,), "pictures have three channels"),
    (("attention_bias", "qkv_bias"), (True,), "SigLIP's projections have a bias"),
    (("rope", "use_rope", "use_qk_norm", "qk_normalization"), (False,), "SigLIP has none"),
)
WHOLE: Sequence[Fixed] = (
    (("connector_act",), TANH_GELU, "BAGEL's connector has gelu by tanh"),
    (("interpolate_pos",), (False,), "BAGEL's positions are not interpolated"),
)
VAE: Sequence[Fixed] = (
    (("act_fn",), ("silu", "swish"), "FLUX's autoencoder has silu"),
    (("norm_num_groups",), (32,), "FLUX's autoencoder normalises 32 groups"),
    (("use_quant_conv", "use_post_quant_conv"), (False,), "FLUX's autoencoder has none"),
    (("mid_block_add_attention",), (True,), "FLUX's autoencoder has it"),
)


def check_fixed(section: Section, fixed: Sequence[Fixed]) -> None:
    """Refuse what this architecture cannot do.

    Raises:
        ConfigError: names the setting.
    """
    for names, allowed, why in fixed:
        for name in names:
            section.only(name, allowed, why)


def rope_theta(llm: Section) -> float:
    """The base of rope's frequencies, from the top of the object or from inside its description of rope.

    Raises:
        ConfigError: two places contradict each other, or positions are scaled in a way that BAGEL's are not.
    """
    found = {name: llm.number(name) for name in THETA if name in llm.values}
    for name in ROPE:
        for rope in _ropes(llm, name):
            _check_unscaled(rope)
            found |= {f"{rope.name}.{key}": rope.number(key) for key in ("rope_theta", "base") if key in rope.values}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name} is {value:g}" for name, value in found.items())
        raise ConfigError(f"{llm.path}: {said}; keep the one that holds")
    theta = next(iter(found.values()), ROPE_THETA)
    if theta <= 0:
        raise ConfigError(f"{llm.where}{next(iter(found))} must be above 0, not {theta:g}")
    return theta


def _ropes(llm: Section, name: str) -> list[Section]:
    """The descriptions of rope under a name: one, or one for each kind of layer."""
    rope = llm.inside(name)
    if rope is None:
        return []
    kinds = [key for key, value in rope.values.items() if isinstance(value, Mapping)]
    return [inner for key in kinds if (inner := rope.inside(key))] if kinds else [rope]


def _check_unscaled(rope: Section) -> None:
    for key in ("rope_type", "type"):
        kind = rope.values.get(key)
        if kind == "linear" and rope.values.get("factor") in (1, 1.0):
            continue
        rope.only(key, ("default",), "BAGEL's positions are not scaled")
    rope.only("mrope_section", (), "BAGEL's rope is of one dimension")
    rope.only("partial_rotary_factor", (1, 1.0), "BAGEL's rope turns whole heads")


def check_layers(llm: Section, head_dim: int) -> None:
    """What else may stand in a decoder's description."""
    check_fixed(llm, DECODER)
    llm.only("head_dim", (head_dim,), f"BAGEL's heads are hidden_size / num_attention_heads = {head_dim} wide")
    kinds = llm.values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        raise ConfigError(f"{llm.where}layer_types must be full_attention for every layer: BAGEL's sees everything")


def tied(llm: Section, whole: Section) -> bool:
    """Whether the configuration says that the embedding is the lm_head too."""
    return llm.values.get("tie_word_embeddings", whole.values.get("tie_word_embeddings")) is True


def eps(section: Section, names: Sequence[str], default: float) -> float:
    """What is added to a variance before its root is taken.

    Raises:
        ConfigError: two spellings contradict each other, or it is none.
    """
    value = section.spelled(names, section.number, default)
    if not 0 < value < 1:
        raise ConfigError(f"{section.where}{next(n for n in names if n in section.values)} must be between 0 and 1")
    return value
