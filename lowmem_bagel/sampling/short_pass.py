"""A short text's pass over all layers, by graphs between which attention is launched.

A pass over few tokens takes what the host takes to launch it: some ten kernels a layer, in all five times as long as
reading the weights (contexts_h200.json). Captured once for some number of rows, on fixed buffers, they serve any text
that has no more tokens: the rows beyond it are computed with whatever they hold, and nobody reads them. Attention is
not captured: what it sees has another length every time, and lies elsewhere.

The same rows go through the same kernels before anything is captured, and where weights are streamed, to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from ..model.bagel import Bagel
from ..model.decoder import ExpertLayer, Layer, ResidentLayers
from ..model.kv_cache import AppendAttention, SequenceView
from ..ops.attention.base import AttentionBackend, Causal
from ..ops.device import GraphMemory, captured

FEWEST, LEAST_ROWS, MOST_ROWS = 2, 16, 64
"""Tokens and rows of a short pass. One token has kernels of its own; and from some hundred on a pass takes what the
device takes."""


def rows_for(tokens: int) -> int | None:
    """How many rows so many tokens are computed in, a power of two; None where that is no short pass."""
    if not FEWEST <= tokens <= MOST_ROWS:
        return None
    return max(LEAST_ROWS, 1 << (tokens - 1).bit_length())


class ShortPass:
    """Passes of up to `rows` tokens through the und expert.

    Attributes:
        hidden: [1, rows, hidden_size], what each piece of a pass leaves to the next.
    """

    def __init__(self, bagel: Bagel, rows: int) -> None:
        config, device = bagel.config.decoder, bagel.device
        self.bagel = bagel
        self.hidden = torch.zeros(1, rows, config.hidden_size, dtype=bagel.residual_dtype, device=device)
        self._layers = [layer["und"] for layer in cast("list[Layer]", bagel.decoder.layers)]
        self._room = self._layers[0].room(1, rows, device)
        self._attended = torch.zeros_like(self._room[0])
        cos, sin = bagel.rope(torch.zeros(1, rows, dtype=torch.int64))
        self._rope = cos, sin
        self._pieces: list[torch.cuda.CUDAGraph] = []

    @property
    def is_captured(self) -> bool:
        return bool(self._pieces)

    def __call__(self, ids: Tensor, view: SequenceView, backend: AttentionBackend) -> Tensor:
        """As `text.append_text`."""
        count = ids.shape[0]
        self.hidden[0, :count] = self.bagel.embed_text(ids)
        positions = torch.arange(view.position, view.position + count)[None]
        for fixed, table in zip(self._rope, self.bagel.rope(positions), strict=True):
            fixed[:, :count] = table
        attend = AppendAttention(view, view.append(count, count), backend, Causal())
        q, k, v = (room[:, :count] for room in self._room)
        for index in self._replayed() if self._pieces else self._launched():
            (self._attended[:, :count],) = attend(index, q, k, v)
        return self.hidden[:, :count].clone()

    def capture(self, memory: GraphMemory) -> None:
        """From now on by graphs, of which each ends a layer and begins the next. Weights must stay where they are."""
        works = [partial(self._begin, self._layers[0])]
        works += [partial(self._go_on, *two) for two in pairwise(self._layers)]
        works += [partial(self._end, self._layers[-1])]
        self._pieces = [captured(self.bagel.device, work, work, memory) for work in works]

    def _launched(self) -> Iterator[int]:
        """Layer by layer, halting where the layer's attention is due."""
        source = self.bagel.decoder.source
        source.begin({"und"})
        for index in range(len(self._layers)):
            layer = source.acquire(index)["und"]
            self._begin(layer)
            yield index
            self._end(layer)
            source.release(index)

    def _replayed(self) -> Iterator[int]:
        self.bagel.decoder.source.begin({"und"})
        for index, piece in enumerate(self._pieces[:-1]):
            piece.replay()
            yield index
        self._pieces[-1].replay()

    def _begin(self, layer: ExpertLayer) -> None:
        layer.project(self.hidden, self._rope, self._room)

    def _end(self, layer: ExpertLayer) -> None:
        hidden = layer.finish(self.hidden, [self._attended])
        if hidden.data_ptr() != self.hidden.data_ptr():
            self.hidden.copy_(hidden)

    def _go_on(self, layer: ExpertLayer, following: ExpertLayer) -> None:
        self._end(layer)
        self._begin(following)


class ShortPasses:
    """A loaded model's, by their rows: made when one is first asked for."""

    def __init__(self, bagel: Bagel) -> None:
        self.bagel = bagel
        self._passes: dict[int, ShortPass] = {}

    def __call__(self, ids: Tensor, view: SequenceView, backend: AttentionBackend) -> Tensor | None:
        """As `text.append_text`; None where these are too many tokens, or too few."""
        rows = rows_for(ids.shape[0])
        if rows is None:
            return None
        if rows not in self._passes:
            self._passes[rows] = ShortPass(self.bagel, rows)
        return self._passes[rows](ids, view, backend)

    def capture(self, memory: GraphMemory) -> None:
        """Those that were asked for, unless they are, or weights are streamed: for who asks again."""
        if isinstance(self.bagel.decoder.source, ResidentLayers):
            for made in self._passes.values():
                if not made.is_captured:
                    made.capture(memory)

    def forget(self) -> None:
        """Give their memory back, and what is captured, before weights move."""
        self._passes.clear()
