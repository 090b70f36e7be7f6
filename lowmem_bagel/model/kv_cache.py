"""Key/value storage and the sequence views that share it.

One cache per request holds the keys and values of all contexts. A sequence view is a list of ranges of it, so that a
branch of guidance is a cheap view of what it shares with the others and nothing is ever copied:

    [ texts of the image branch | scratch | shared prefix | rest of the full context ]

Scratch holds the picture being generated. Attention inside a picture sees all keys in any order, so each branch
(full, without the last text, texts alone) is one contiguous range together with the scratch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checkpoint.config import DecoderConfig
from ..ops.attention.base import AttentionBackend, Mask


class KVCache:
    """Keys and values of all layers: two tensors [layers, capacity, kv_heads, head_dim], allocated once."""

    def __init__(self, config: DecoderConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_layers, capacity, config.num_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def grow(self, tokens: int) -> None:
        """Make room for more tokens at the end. Copies everything: for the rare case that lengths were not known."""
        self.keys, self.values = (
            torch.cat((old, old.new_empty(old.shape[0], tokens, *old.shape[2:])), dim=1)
            for old in (self.keys, self.values)
        )

    def copy_rows(self, other: KVCache, rows: range, start: int) -> None:
        """Keys and values of these rows of another cache of the same layers, to rows from `start` on."""
        for ours, theirs in ((self.keys, other.keys), (self.values, other.values)):
            for layer, there in zip(ours, theirs, strict=True):  # each contiguous on both sides
                layer[start : start + len(rows)] = there[rows.start : rows.stop]

    @property
    def nbytes(self) -> int:
        """On the device of the first layer."""
        return self.keys.nbytes + self.values.nbytes

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        """k, v: [T, kv_heads, head_dim]."""
        self.keys[layer, start : start + k.shape[0]] = k
        self.values[layer, start : start + v.shape[0]] = v

    def read(self, layer: int, spans: Sequence[range]) -> tuple[Tensor, Tensor]:
        """Keys and values of the spans in their order, [1, S, kv_heads, head_dim]; a view where they adjoin."""
        spans = _merged(spans)
        keys, values = (
            [cache[layer : layer + 1, s.start : s.stop] for s in spans] for cache in (self.keys, self.values)
        )
        if len(spans) == 1:
            return keys[0], values[0]
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)


class DividedCache(KVCache):
    """Of layers that lie on several devices: a cache for each stretch of them, of which keys never leave the device."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        self._caches = caches
        self._of = [(cache, layer) for cache in caches for layer in range(cache.keys.shape[0])]

    @property
    def capacity(self) -> int:
        return self._caches[0].capacity

    def grow(self, tokens: int) -> None:
        for cache in self._caches:
            cache.grow(tokens)

    def copy_rows(self, other: KVCache, rows: range, start: int) -> None:
        assert isinstance(other, DividedCache)
        for ours, theirs in zip(self._caches, other._caches, strict=True):
            ours.copy_rows(theirs, rows, start)

    @property
    def nbytes(self) -> int:
        return self._caches[0].nbytes

    def write(self, layer: int, start: int, k: Tensor, v: Tensor) -> None:
        cache, own = self._of[layer]
        cache.write(own, start, k, v)

    def read(self, layer: int, spans: Sequence[range]) -> tuple[Tensor, Tensor]:
        cache, own = self._of[layer]
        return cache.read(own, spans)


def _merged(spans: Sequence[range]) -> list[range]:
    merged: list[range] = []
    for span in spans:
        if merged and merged[-1].stop == span.start:
            merged[-1] = range(merged[-1].start, span.stop)
        elif len(span):
            merged.append(span)
    return merged


def _in_place(spans: Sequence[range]) -> list[range]:
    """The spans as they lie in the cache: where all keys are seen their order is nothing."""
    return _merged(sorted(spans, key=lambda span: span.start))


@dataclass
class Region:
    """A part of the cache that views append to, front to back; or back to front, to lie beside what comes after it."""

    start: int
    stop: int
    used: int = 0
    backwards: bool = False

    def take(self, count: int) -> range:
        left = self.stop - self.start - self.used
        assert count <= left, f"room for {left} more tokens, {count} wanted"
        self.used += count
        begin = self.stop - self.used if self.backwards else self.start + self.used - count
        return range(begin, begin + count)


@dataclass
class SequenceView:
    """What a block of new tokens sees: ranges of the cache, and the rope position that comes next."""

    kv_cache: KVCache
    region: Region
    spans: list[range] = field(default_factory=list)
    position: int = 0

    @property
    def length(self) -> int:
        """Tokens in view."""
        return sum(len(span) for span in self.spans)

    def fork(self, region: Region | None = None) -> SequenceView:
        """The same tokens, not copied. Only one of the forks may append to a shared region."""
        return SequenceView(self.kv_cache, region or self.region, list(self.spans), self.position)

    def same_as(self, other: SequenceView) -> bool:
        """Whether both hold the very same tokens."""
        return self.position == other.position and _merged(self.spans) == _merged(other.spans)

    def append(self, count: int, positions: int) -> range:
        """Take room for `count` tokens that advance rope by `positions`; returns where their keys go."""
        span = self.region.take(count)
        self.spans = _merged([*self.spans, span])
        self.position += positions
        return span

    def drop_after(self, length: int, position: int) -> None:
        """Forget the tokens after the first `length`, which must be the last ones of the region."""
        surplus = self.length - length
        assert surplus <= len(self.spans[-1]) if surplus else True
        if surplus:
            last = self.spans[-1]
            assert last.stop == self.region.start + self.region.used
            self.spans[-1] = range(last.start, last.stop - surplus)
            self.region.used -= surplus
        self.position = position


@dataclass(frozen=True)
class Excerpt:
    """What some views of a cache see, and the scratch, closer together in a cache of their own: in the same order, so
    that attention comes out the same.

    rows: ranges of the first cache, one after the other in the second. scratch: where it is there.
    """

    rows: Sequence[range]
    scratch: range

    @classmethod
    def of(cls, views: Sequence[SequenceView], scratch: range) -> Excerpt:
        """Of views that are complete."""
        spans = [scratch, *(span for view in views for span in view.spans)]
        rows: list[range] = []
        for span in sorted(spans, key=lambda span: span.start):
            start = max(span.start, rows[-1].stop) if rows else span.start
            if start < span.stop:
                rows.append(range(start, span.stop))
        return cls(rows, _moved(rows, scratch))

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))

    def view(self, view: SequenceView, kv_cache: KVCache) -> SequenceView:
        """One of the views in the other cache; nothing more can be appended to it."""
        return SequenceView(kv_cache, Region(0, 0), [_moved(self.rows, span) for span in view.spans], view.position)

    def pieces(self, ours: KVCache, theirs: KVCache) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values that the second cache must get, the scratch aside: (from, to), contiguous both."""
        for cache, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            for layer, there in zip(cache, other, strict=True):
                for rows in self.rows:
                    moved = _moved(self.rows, rows)
                    if moved != self.scratch:
                        yield layer[rows.start : rows.stop], there[moved.start : moved.stop]


def _moved(rows: Sequence[range], span: range) -> range:
    """Where a range that lies in adjoining ones of the rows is when they are moved together."""
    before = sum(len(range(row.start, min(row.stop, span.start))) for row in rows if row.start < span.start)
    return range(before, before + len(span))


class AppendAttention:
    """Attention of a block that is appended to what a view sees (batch of one): its keys are kept."""

    def __init__(self, view: SequenceView, span: range, backend: AttentionBackend, mask: Mask) -> None:
        self.view, self.span, self.backend, self.mask = view, span, backend, mask

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        kv_cache = self.view.kv_cache
        kv_cache.write(layer, self.span.start, k[0], v[0])
        spans = self.view.spans if self.mask is not None else _in_place(self.view.spans)
        keys, values = kv_cache.read(layer, spans)
        return [self.backend(q, keys, values, self.mask)]


class PictureAttention:
    """Attention of the picture being generated, one batch entry per guidance branch: its keys are scratch."""

    def __init__(self, branches: Sequence[SequenceView], scratch: range, backend: AttentionBackend) -> None:
        self.backend, self.scratch = backend, scratch
        self.kv_cache = branches[0].kv_cache
        self.spans = [_in_place([*b.spans, scratch]) for b in branches]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Sequence[Tensor]:
        attended = []
        for index, spans in enumerate(self.spans):
            # The branches take turns with the scratch; the stream keeps their order.
            self.kv_cache.write(layer, self.scratch.start, k[index], v[index])
            keys, values = self.kv_cache.read(layer, spans)
            attended.append(self.backend(q[index : index + 1], keys, values, None))
        return attended
