"""Keys and values of blocks that were computed before, so that what repeats is copied and not computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from hashlib import sha256

import torch
from torch import Tensor

from ..model.kv_cache import KVCache

NOTHING = b""
"""The key of a context that holds nothing yet."""


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
        limit: bytes of all blocks.
        host_buffer: makes uint8 [n] where blocks wait in host memory; None where they stay on the cache's device.

    Attributes:
        nbytes: of the blocks that are kept.
        found, missed: how often a block was there, and was not.
    """

    def __init__(self, limit: int, host_buffer: Callable[[int], Tensor] | None = None) -> None:
        self.limit, self.nbytes = limit, 0
        self.found = self.missed = 0
        self._host_buffer = host_buffer
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()
        """As they were allocated, uint8: page-locked memory is unlocked when its own tensor goes, whatever views it."""

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def restore(self, key: bytes, kv_cache: KVCache, rows: range) -> None:
        """Copy a block that is kept to these rows of a cache, as many as it has tokens."""
        self._blocks.move_to_end(key)
        self.found += 1
        for kept, there in _layers(self._blocks[key], kv_cache, rows):
            there.copy_(kept)

    def keep(self, key: bytes, kv_cache: KVCache, rows: range) -> None:
        """Remember a block that was computed into these rows. One that is larger than the store is not kept."""
        self.missed += 1
        nbytes = 2 * kv_cache.keys[:, rows.start : rows.stop].nbytes
        if nbytes > self.limit:
            return
        while self.nbytes + nbytes > self.limit:
            self._forget(next(iter(self._blocks)))
        block = self._buffer(nbytes, kv_cache.keys.device)
        for kept, there in _layers(block, kv_cache, rows):
            kept.copy_(there)
        self._blocks[key] = block  # now that it is whole
        self.nbytes += nbytes

    def give_way(self) -> int:
        """Memory ran out on the device: keep nothing that is there, and from now on half as much. Returns the bytes
        that are free now."""
        if self._host_buffer is not None or not self.nbytes:
            return 0
        freed, self.limit = self.nbytes, self.limit // 2
        self.clear()
        return freed

    def clear(self) -> None:
        """Keep nothing of what there is."""
        self._blocks.clear()
        self.nbytes = 0

    def _buffer(self, nbytes: int, device: torch.device) -> Tensor:
        if self._host_buffer is not None:
            return self._host_buffer(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def _forget(self, key: bytes) -> None:
        self.nbytes -= self._blocks.pop(key).nbytes


def _layers(block: Tensor, kv_cache: KVCache, rows: range) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys, then values, of one layer after the other: in the block, and in these rows of the cache.

    One by one both are contiguous, so that no copy between host and device needs memory in between.
    """
    caches = kv_cache.keys, kv_cache.values
    shape = (2, len(caches[0]), len(rows), *caches[0].shape[2:])
    for of_block, cache in zip(block.view(caches[0].dtype).view(shape), caches, strict=True):
        yield from zip(of_block, cache[:, rows.start : rows.stop], strict=True)
