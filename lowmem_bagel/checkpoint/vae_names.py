"""FLUX's autoencoder under diffusers' names. No torch here."""

from __future__ import annotations

import re

_MIDDLE = {"resnets.0": "block_1", "resnets.1": "block_2", "attentions.0": "attn_1"}
_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "query": "q", "key": "k",
    "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
"""Newer and older names."""

_BLOCK = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.resnets\.(\d{1,3})\.(\w+)\.(weight|bias)")
_SAMPLER = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.(down|up)samplers\.0\.conv\.(weight|bias)")
_MID_BLOCK = re.compile(r"(encoder|decoder)\.mid_block\.(resnets\.[01]|attentions\.0)\.(\w+(?:\.0)?)\.(weight|bias)")
_NORM_OUT = re.compile(r"(encoder|decoder)\.conv_norm_out\.(weight|bias)")


def published_name(name: str, levels: int) -> str:
    """FLUX's name of a tensor that diffusers calls `name`, as it is where it is none of those; `levels` of resolution.

    FLUX counts the decoder's levels from the finest, diffusers from the coarsest.
    """
    if match := _BLOCK.fullmatch(name):
        side, way, level, block, inner, kind = match.groups()
        inner = "nin_shortcut" if inner == "conv_shortcut" else inner
        return f"{side}.{way}.{_level(way, level, levels)}.block.{block}.{inner}.{kind}"
    if match := _SAMPLER.fullmatch(name):
        side, way, level, _, kind = match.groups()
        return f"{side}.{way}.{_level(way, level, levels)}.{way}sample.conv.{kind}"
    if match := _MID_BLOCK.fullmatch(name):
        side, block, inner, kind = match.groups()
        inner = _ATTENTION.get(inner, inner) if block == "attentions.0" else inner
        return f"{side}.mid.{_MIDDLE[block]}.{inner}.{kind}"
    return _NORM_OUT.sub(r"\1.norm_out.\2", name)


def _level(way: str, level: str, levels: int) -> int:
    return int(level) if way == "down" else levels - 1 - int(level)
