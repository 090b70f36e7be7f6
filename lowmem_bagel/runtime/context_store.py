"""Keys and values of blocks that were computed before, so that what repeats is copied and not computed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from hashlib import sha256

from torch import Tensor

from ..model.kv_cache import KVCache

NOTHING = b""
"""The key of a context that holds nothing yet."""
ALIGNMENT = 256
"""Bytes that blocks begin at a multiple of."""


def key_after(before: bytes, *about: bytes) -> bytes:
    """The key of a context one block longer. `about` is all that the block's keys and values depend on beside the
    blocks before it; its parts are told apart."""
    found = sha256(before)
    for part in about:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


class ContextStore:
    """Blocks by the key of the context that ends in them; the least recently used leave first.

    A block is kept as it was computed, all layers of it, and its key stands for every block before it: so a context
    that begins as an earlier one is found block by block, however far it is the same, with the same bits. Blocks do not
    refer to each other: one that has left is computed again, and those after it are still right.

    Used within the pipeline's turn, as the rest of the model.

    Args:
        room: uint8 [n] that blocks lie in, on the cache's device or the host. Allocated once, whatever comes and goes:
            blocks among a request's own tensors would leave holes that no other tensor fits in.

    Attributes:
        found, missed: how often a block was there, and was not.
    """

    def __init__(self, room: Tensor) -> None:
        self.room = room
        self.found = self.missed = 0
        self._blocks: OrderedDict[bytes, range] = OrderedDict()
        """Where in the room."""

    @property
    def nbytes(self) -> int:
        """Of the blocks that are kept."""
        return sum(map(len, self._blocks.values()))

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def restore(self, key: bytes, kv_cache: KVCache, rows: range) -> None:
        """Copy a block that is kept to these rows of a cache, as many as it has tokens."""
        self._blocks.move_to_end(key)
        self.found += 1
        for kept, there in self._pieces(self._blocks[key], kv_cache, rows):
            there.copy_(kept)

    def keep(self, key: bytes, kv_cache: KVCache, rows: range) -> None:
        """Remember a block that was computed into these rows. One that is larger than the room is not kept."""
        self.missed += 1
        place = self._cleared(2 * kv_cache.keys[:, rows.start : rows.stop].nbytes)
        if place is None:
            return
        for kept, there in self._pieces(place, kv_cache, rows):
            kept.copy_(there)
        self._blocks[key] = place  # now that it is whole

    def clear(self) -> None:
        """Keep nothing of what there is."""
        self._blocks.clear()

    def _cleared(self, nbytes: int) -> range | None:
        """Room for so many bytes, once as many of the least recently used have left as it takes."""
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if size > self.room.numel():
            return None
        while (start := self._gap(size)) is None:
            self._blocks.popitem(last=False)
        return range(start, start + size)

    def _gap(self, size: int) -> int | None:
        """Where the first gap of this size begins."""
        start = 0
        for block in sorted(self._blocks.values(), key=lambda block: block.start):
            if block.start - start >= size:
                return start
            start = block.stop
        return start if self.room.numel() - start >= size else None

    def _pieces(self, place: range, kv_cache: KVCache, rows: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys, then values: in the room, and in these rows of the cache.

        All layers at once where both lie on one device: a launch for each of them would take longer than copying.
        Between host and device one layer after the other: each is contiguous on both sides, so that its copy needs no
        memory in between.
        """
        caches = kv_cache.keys, kv_cache.values
        shape = (2, len(caches[0]), len(rows), *caches[0].shape[2:])
        of_type = self.room[place.start : place.stop].view(caches[0].dtype)
        for of_block, cache in zip(of_type[: math.prod(shape)].view(shape), caches, strict=True):
            of_cache = cache[:, rows.start : rows.stop]
            if of_block.device == of_cache.device:
                yield of_block, of_cache
            else:
                yield from zip(of_block, of_cache, strict=True)
