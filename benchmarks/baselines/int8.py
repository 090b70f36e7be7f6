"""The same INT8 file run by other packages: bitsandbytes' LLM.int8() and optimum-quanto's qint8.

Neither requantises: bitsandbytes gets our values with absmax = scale * 127, quanto our values and scales. Both are
optional; constructing a backend whose package is missing says which extra to install.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_bagel.formats.base import Refused, Site, StoredLinears
from lowmem_bagel.formats.extras import require
from lowmem_bagel.formats.int8.ways import WITHOUT_VNNI, Int8Linears
from lowmem_bagel.ops.int8 import pairs_overflow
from lowmem_bagel.ops.linear import Product, Weights

ALIGNMENT = 16
"""Bytes to which quanto's bfloat16 kernel on the CPU needs its int8 weight aligned; it crashes otherwise."""


def bitsandbytes(site: Site) -> StoredLinears:
    linears = Int8Linears(site, BitsandbytesInt8(), "bitsandbytes")
    if site.device.type == "cpu" and pairs_overflow():
        raise Refused(WITHOUT_VNNI)
    return linears


def quanto(site: Site) -> StoredLinears:
    return Int8Linears(site, QuantoInt8(), "quanto")


class BitsandbytesInt8(Product):
    """LLM.int8(): activations row-wise int8, columns with an activation above `threshold` in float16 (0: none).

    bitsandbytes works in float16, so activations or results beyond 65504 become infinite: choose another backend for
    a model that has them.
    """

    graph_blocker = "bitsandbytes counts outliers on the host"

    def __init__(self, threshold: float = 6.0) -> None:
        self.package = require("bitsandbytes", "bitsandbytes", "bitsandbytes")
        self.threshold = threshold

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        weight, scales, bias = weights
        assert scales is not None
        state = self.package.MatmulLtState()
        state.CB, state.SCB = weight, scales * 127
        state.has_fp16_weights = False
        state.is_training = False
        state.threshold = self.threshold
        # Cast here, because bitsandbytes does it too but logs a warning on every call; two dimensions, because its
        # search for outlier columns reads the first two.
        tokens = x.reshape(-1, x.shape[-1]).to(torch.float16)
        half_bias = None if bias is None else bias.to(torch.float16)
        with torch.no_grad():
            y: Tensor = self.package.matmul(tokens, weight, state=state, bias=half_bias)
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


class QuantoInt8(Product):
    """quanto's weight-only int8. It computes in the dtype of its scales, so ours are rounded to x's dtype."""

    def __init__(self) -> None:
        self.package = require("optimum.quanto", "optimum-quanto", "quanto")

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        weight, scales, bias = weights
        assert scales is not None
        data = weight if weight.data_ptr() % ALIGNMENT == 0 else weight.clone()
        packed = self.package.WeightQBytesTensor.create(
            self.package.qint8,
            axis=0,
            size=data.size(),
            stride=data.stride(),
            data=data,
            scale=scales.to(x.dtype).unsqueeze(-1),
        )
        with torch.no_grad():
            return F.linear(x, packed, None if bias is None else bias.to(x.dtype))
