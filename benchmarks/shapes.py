"""The shapes that are measured: BAGEL-7B's, as the planner knows it, and a small one, of small pictures, for trying a
benchmark out."""

from __future__ import annotations

from dataclasses import replace

from lowmem_bagel.checkpoint.config import BagelConfig, DecoderConfig, ResizeRule, Routed, VaeConfig, VitConfig
from lowmem_bagel.checkpoint.tensors import FUSED
from lowmem_bagel.errors import SettingError
from lowmem_bagel.planner.facts import SHAPES as PUBLISHED

TINY = BagelConfig(
    DecoderConfig(256, 2, 4, 2, 512, 512, 1e6, 1e-6),
    VitConfig(64, 2, 4, 112, 14, 980, 1e-6),
    VaeConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1),
    ResizeRule(512, 192, 16),
    ResizeRule(448, 168, 14),
)
TINY_MOE = replace(TINY, decoder=replace(TINY.decoder, routed=Routed(4, 2, 128, frozenset((1,)))))
SHAPES = {**PUBLISHED, "tiny": TINY, "tiny-moe": TINY_MOE}


def shape_named(name: str) -> BagelConfig:
    """The dimensions of a shape.

    Raises:
        SettingError: there is none of this name.
    """
    if name not in SHAPES:
        raise SettingError(f"unknown shape {name!r}; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def projections(decoder: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of the linears of one expert's layer, as a checkpoint stores them."""
    q, k, v = decoder.qkv_rows
    hidden, wide = decoder.hidden_size, decoder.intermediate_size
    return {
        "q": (q, hidden), "k": (k, hidden), "v": (v, hidden), "o": (hidden, hidden),
        "gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide),
    }  # fmt: skip


def linears(decoder: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Rows and columns of the same as they are multiplied: qkv, o, gate_up and down."""
    each = projections(decoder)
    return {fused: (sum(each[part][0] for part in parts), each[parts[0]][1]) for fused, parts in FUSED.items()}
