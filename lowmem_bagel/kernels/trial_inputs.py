"""What kernels are tried on: a decoder's own sizes, by which their settings are chosen.

A trial is to launch what a request will launch, and yet take no time. So a weight has all its rows, but only FEW_ROWS
different ones, each under many scales: what comes out is compared whole, with products of the few.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops.dtypes import wide
from ..ops.linear import SWIGLU, Add, After, Before, Product, RMSNorm, Weights
from ..ops.routed import Groups, Routes

FEW_ROWS = 96
EPS = 1e-6

Pair = tuple[Tensor, Tensor]
"""What a kernel gave, and what it should have given."""


class RoutedSizes(Protocol):
    """What `checkpoint.config.Routed` tells of routed experts."""

    @property
    def count(self) -> int: ...
    @property
    def active(self) -> int: ...
    @property
    def size(self) -> int: ...


class DecoderSizes(Protocol):
    """What `checkpoint.config.DecoderConfig` tells of a decoder."""

    @property
    def routed(self) -> RoutedSizes | None: ...

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class RoutedShape:
    """The numbers alone."""

    count: int
    active: int
    size: int


class DecoderShape(NamedTuple):
    """The sizes alone."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    routed: RoutedShape | None = None


SMALL = DecoderShape(64, 64, 2, 1, 32, 1100)
"""For kernels whose settings no size decides."""
FEW_EXPERTS = RoutedShape(3, 2, 32)
"""For a decoder without routed experts."""


@dataclass(frozen=True)
class Sizes:
    """A decoder, and the dtype of its arithmetic: what kernels' settings are chosen by, beside the card."""

    decoder: DecoderSizes
    dtype: torch.dtype

    @property
    def around(self) -> torch.dtype:
        """Of what linears are given and give: float32 in fp16 arithmetic."""
        return wide(self.dtype)

    @property
    def qkv(self) -> int:
        """Rows of the fused projection."""
        return (self.decoder.num_heads + 2 * self.decoder.num_kv_heads) * self.decoder.head_dim

    @property
    def linears(self) -> tuple[tuple[int, int, bool], ...]:
        """A layer's four as (out_features, in_features, whether there is a bias)."""
        hidden, middle = self.decoder.hidden_size, self.decoder.intermediate_size
        return (self.qkv, hidden, True), (hidden, hidden, False), (2 * middle, hidden, False), (hidden, middle, False)

    @property
    def routed(self) -> RoutedSizes:
        return self.decoder.routed or FEW_EXPERTS


@dataclass(frozen=True)
class Call:
    """A product as a layer asks for it. x: [tokens, k], or twice as wide where `before` is SwiGLU."""

    x: Tensor
    n: int
    k: int
    before: Before = None
    after: After = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class RepeatedRows:
    """A weight [n, k] whose row i is scale[i] times row i % FEW_ROWS of `few`, float32 [FEW_ROWS, k]."""

    weights: Weights
    few: Tensor
    scale: Tensor

    def expected(self, call: Call) -> Tensor:
        """What the call gives, in float32."""
        x = call.x.float()
        if isinstance(call.before, RMSNorm):
            x = RMSNorm(call.before.weight.float(), call.before.eps)(x)
        elif call.before is not None:
            x = call.before(x)
        y = repeated(x @ self.few.T, call.n, dim=1) * self.scale
        y = y if call.bias is None else y + call.bias.float()
        if isinstance(call.after, Add):
            return call.after.residual.float() + y
        return y if call.after is None else call.after(y)


MakeRows = Callable[[int, int], RepeatedRows]
"""(n, k) -> a weight of one format."""


def random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same normal numbers for the same shape, wherever."""
    values = torch.randn(*shape, generator=_generator(*shape, seed), device="cpu")
    return values.to(device, dtype)


def random_bytes(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    """uint8, all values alike often."""
    values = torch.randint(0, 256, shape, generator=_generator(*shape, seed), device="cpu", dtype=torch.uint8)
    return values.to(device)


def repeated(rows: Tensor, n: int, dim: int = 0) -> Tensor:
    """FEW_ROWS rows, one after another and again, until there are n."""
    return rows.index_select(dim, torch.arange(n, device=rows.device) % FEW_ROWS)


def row_scales(device: torch.device, n: int, k: int) -> Tensor:
    """Powers of two that are about 1 / sqrt(k), so that results are about as large as what is added to them."""
    power = torch.arange(n, device=device) // FEW_ROWS % 3 - 1 - round(math.log2(k) / 2)
    return torch.pow(2.0, power.float())


def layer_calls(sizes: Sizes, device: torch.device, tokens: int, product: Product) -> Iterator[Call]:
    """What a layer asks of `product` for so many tokens, as `model.decoder.ExpertLayer` does."""
    hidden, middle = sizes.decoder.hidden_size, sizes.decoder.intermediate_size

    def some(*shape: int, seed: int = 0) -> Tensor:
        return random(device, *shape, dtype=sizes.around, seed=seed)

    def residual() -> Add:
        return Add(some(tokens, hidden, seed=1))

    x, norm = some(tokens, hidden), RMSNorm(some(hidden), EPS)
    yield Call(x, sizes.qkv, hidden, norm, bias=some(sizes.qkv))
    yield Call(x, hidden, hidden, after=residual())
    if product.fuses(tokens, norm, SWIGLU):
        yield Call(x, 2 * middle, hidden, norm, SWIGLU)
        yield Call(some(tokens, middle), hidden, middle, after=residual())
    else:
        yield Call(x, 2 * middle, hidden, norm)
        yield Call(some(tokens, 2 * middle), hidden, middle, SWIGLU, residual())


def tried_calls(product: Product, make: MakeRows, calls: Iterator[Call]) -> Iterator[Pair]:
    """Each call's result and what it should be."""
    for call in calls:
        rows = make(call.n, call.k)
        expected = rows.expected(call)  # first: a residual is given up
        yield product.product(call.x, rows.weights._replace(bias=call.bias), call.before, call.after), expected


def uneven_groups(device: torch.device, parts: int, tile: int, rows: int | None) -> Groups:
    """Groups of more than a tile's rows, of one row, of three and of none, tile + 6 rows in all.

    rows: of the activations that they are taken from, in no order; None where they stand in theirs.
    """
    sizes = torch.zeros(parts, dtype=torch.int64, device="cpu")
    for part, size in ((0, tile + 2), (parts // 2, 1), (parts - 1, 3)):
        sizes[part] += size
    offsets = torch.cat((torch.zeros_like(sizes[:1]), sizes.cumsum(0)))
    taken = None if rows is None else (torch.arange(tile + 6, device="cpu") * 7 % rows).int().to(device)
    return Groups(offsets.int().to(device), taken)


def tried_groups(
    device: torch.device, sizes: Sizes, make: MakeRows, tile: int
) -> Iterator[tuple[RepeatedRows, Groups, Callable[[Tensor], Tensor]]]:
    """What routed experts multiply: all experts' rows of a linear, groups, and what activations give, in float32."""
    routed, hidden = sizes.routed, sizes.decoder.hidden_size
    for n, k, rows in ((2 * routed.size, hidden, tile), (hidden, routed.size, None)):
        weight, groups = make(routed.count * n, k), uneven_groups(device, routed.count, tile, rows)

        def expected(x: Tensor, weight: RepeatedRows = weight, groups: Groups = groups, n: int = n) -> Tensor:
            few = x.float() @ weight.few.T
            number = torch.searchsorted(groups.offsets[1:], torch.arange(groups.slots(x), device=x.device), right=True)
            columns = number[:, None] * n + torch.arange(n, device=x.device)
            chosen = few if groups.rows is None else few.index_select(0, groups.rows)
            return chosen.gather(1, columns % FEW_ROWS) * weight.scale[columns]

        yield weight, groups, expected


def some_routes(device: torch.device, tokens: int, routed: RoutedSizes) -> Routes:
    """Slots in no order, and gains of both signs."""
    slots = tokens * routed.active
    places = (torch.arange(slots, device=device) * 7 % slots).view(tokens, -1).int()
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    return Routes(nothing, nothing, places, random(device, tokens, routed.active))


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(zlib.crc32(repr(seeds).encode()))
