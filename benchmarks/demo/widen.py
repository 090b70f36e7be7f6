"""More room in a trained decoder: wider feed-forward layers that compute what the narrow ones did, until they learn."""

from __future__ import annotations

from dataclasses import replace

import torch

from lowmem_bagel.checkpoint.config import BagelConfig
from lowmem_bagel.model.bagel import Bagel

from .forward import new_bagel
from .layout import GRID


@torch.no_grad()
def widened(bagel: Bagel, config: BagelConfig, intermediate_size: int) -> tuple[Bagel, BagelConfig]:
    """The model with `intermediate_size` neurons in each feed-forward layer. The new ones read the hidden state by
    fresh weights and write nothing to it until they are trained, as in Net2Net (Chen et al. 2016,
    https://arxiv.org/abs/1511.05641)."""
    have = config.decoder.intermediate_size
    if intermediate_size < have:
        raise ValueError(f"the feed-forward layers have {have} neurons already, more than {intermediate_size}")
    wider = replace(config, decoder=replace(config.decoder, intermediate_size=intermediate_size))
    grown = new_bagel(wider, bagel.device, GRID)
    known = dict(bagel.named_parameters())
    for name, parameter in grown.named_parameters():
        if name.endswith("gate_up.weight"):
            for into, part in zip(parameter.chunk(2), known[name].chunk(2), strict=True):
                into[:have] = part
        elif name.endswith("down.weight"):
            parameter.zero_()
            parameter[:, :have] = known[name]
        else:
            parameter.copy_(known[name])
    return grown, wider
