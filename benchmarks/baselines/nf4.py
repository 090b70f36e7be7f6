"""NF4 weights multiplied by bitsandbytes' own 4-bit kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lowmem_bagel.formats.base import Site, StoredLinears
from lowmem_bagel.formats.extras import require
from lowmem_bagel.formats.nf4.levels import BLOCK, CODEBOOK
from lowmem_bagel.formats.nf4.spec import SPEC
from lowmem_bagel.ops.linear import Product, Weights


def bitsandbytes(site: Site) -> StoredLinears:
    return StoredLinears(site, SPEC, BitsandbytesNf4(), "nf4 (bitsandbytes)")


class BitsandbytesNf4(Product):
    """bitsandbytes' own 4-bit kernels on the stored bytes."""

    def __init__(self) -> None:
        self.package = require("bitsandbytes", "bitsandbytes", "bitsandbytes")
        self.codebooks: dict[torch.device, Tensor] = {}

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        weight, scales, bias = weights
        assert scales is not None
        state = self.package.functional.QuantState(
            absmax=scales.reshape(-1),
            shape=torch.Size((weight.shape[0], 2 * weight.shape[1])),
            code=self._codebook(weight.device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=x.dtype,
        )
        same_bias = None if bias is None else bias.to(x.dtype)
        with torch.no_grad():
            y: Tensor = self.package.matmul_4bit(x, weight.view(-1, 1), quant_state=state, bias=same_bias)
        return y

    def _codebook(self, device: torch.device) -> Tensor:
        if device not in self.codebooks:
            self.codebooks[device] = torch.tensor(CODEBOOK, dtype=torch.float32, device=device)
        return self.codebooks[device]
