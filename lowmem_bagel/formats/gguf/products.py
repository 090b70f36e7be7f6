"""Products of weights in GGUF's blocks, which lie as the bytes [nbytes] that they are in the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoint.gguf_blocks import BLOCK_TYPES
from ...ops.elementwise import Elementwise
from ...ops.linear import After, Before, Product, Rows, SwiGLU, Weights, count_tokens
from ..dense.elementwise import ElementwiseDense
from ..scaled_matmul import FLOAT32_RESULT, Fp16Matmul, Fp16Weights
from .packed import PackedBlocks


class DecodedBlocks(Product):
    """Decodes the whole weight into x's dtype, then multiplies: the reference, and the way that always works."""

    def __init__(self, packed: PackedBlocks) -> None:
        self.packed = packed

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        weight, _, bias = weights
        dense = self.packed.decoded(weight, x.shape[-1], x.dtype)
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


class BlocksAsFp16(Fp16Weights):
    """In fp16 arithmetic."""

    def __init__(self, way: Fp16Matmul, around: Elementwise | None, packed: PackedBlocks) -> None:
        super().__init__(way, around)
        self.packed = packed

    def raw(self, values: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
        if len(values) == 1 and self.packed.compiled:
            return self.packed.times_token(values, weight)
        return self.way.multiply(values, self.packed.decoded(weight, values.shape[-1], torch.float16))


class ElementwiseBlocks(BlocksAsFp16):
    """In bf16 without Triton: one token is multiplied as the weight is read; for more it is made bf16."""

    def __init__(self, around: Elementwise, packed: PackedBlocks) -> None:
        super().__init__(FLOAT32_RESULT, around, packed)
        self.dense = ElementwiseDense(around)

    def product(self, x: Rows, weights: Weights, before: Before = None, after: After = None) -> Tensor:
        if count_tokens(x) == 1:
            return super().product(x, weights, before, after)
        rows = x if isinstance(x, Tensor) else x[0]
        width = rows.shape[-1] // (2 if isinstance(before, SwiGLU) else 1)
        dense = self.packed.decoded(weights.weight, width, torch.bfloat16)
        return self.dense.product(x, Weights(dense, None, weights.bias), before, after)


class MixedBlocks(Product):
    """A linear that stacks weights of several types, as other programs' mixes have them: one product a type.

    parts: type and rows, in order. products: of each type.
    """

    def __init__(self, parts: Sequence[tuple[str, int]], products: Mapping[str, Product]) -> None:
        self.parts, self.products = tuple(parts), products

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        return torch.cat([self.products[kind].product(x, part) for kind, part in self._parts(x, weights)], dim=-1)

    def of_part(self, weights: Weights, width: int, number: int, count: int) -> tuple[Product, Weights]:
        """Routed experts may be of several types."""
        rows = sum(height for _, height in self.parts) // count
        first, last, row, start, length = number * rows, (number + 1) * rows, 0, 0, 0
        parts: list[tuple[str, int]] = []
        for kind, height in self.parts:
            before, own = (min(max(end - row, 0), height) for end in (first, last))
            start += BLOCK_TYPES[kind].bytes_of((before, width))
            length += BLOCK_TYPES[kind].bytes_of((own - before, width))
            parts += [(kind, own - before)] if own > before else []
            row += height
        return MixedBlocks(parts, self.products), Weights(weights.weight[start : start + length])

    def _parts(self, x: Tensor, weights: Weights) -> Iterator[tuple[str, Weights]]:
        at = row = 0
        for kind, rows in self.parts:
            nbytes = BLOCK_TYPES[kind].bytes_of((rows, x.shape[-1]))
            bias = None if weights.bias is None else weights.bias[row : row + rows]
            yield kind, Weights(weights.weight[at : at + nbytes], None, bias)
            at, row = at + nbytes, row + rows
