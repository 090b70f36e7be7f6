"""What is kept of contexts: the very bits, within its bytes, the least recently used leaving first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lowmem_bagel.checkpoint.config import DecoderConfig
from lowmem_bagel.model.kv_cache import KVCache
from lowmem_bagel.runtime.context_store import ALIGNMENT, NOTHING, ContextStore, key_after

DECODER = DecoderConfig(32, 4, 4, 2, 64, 10, 1e6, 1e-6)
A_TOKEN = 2 * 4 * 2 * 8 * 2
"""Bytes in bfloat16: keys and values of four layers with two heads of eight; a multiple of `ALIGNMENT`."""
assert A_TOKEN % ALIGNMENT == 0


def cache(tokens: int = 20) -> KVCache:
    made = KVCache(DECODER, tokens, torch.bfloat16, torch.device("cpu"))
    for values in (made.keys, made.values):
        values.copy_(torch.randn(values.shape))
    return made


def store_of(tokens: int) -> ContextStore:
    return ContextStore(torch.empty(tokens * A_TOKEN, dtype=torch.uint8))


def held(kv_cache: KVCache, rows: range) -> Tensor:
    return torch.stack((kv_cache.keys, kv_cache.values))[:, :, rows.start : rows.stop].clone()


def test_a_block_comes_back_as_it_was_at_another_place(poisoned: None) -> None:
    store = store_of(20)
    first, second = cache(), cache(30)
    wanted, around = held(first, range(3, 8)), held(second, range(30))
    store.keep(b"a", first, range(3, 8))
    first.keys.zero_()  # what is kept is a copy
    store.restore(b"a", second, range(11, 16))
    assert torch.equal(held(second, range(11, 16)), wanted)
    for rows in (range(11), range(16, 30)):
        assert torch.equal(held(second, rows), around[:, :, rows.start : rows.stop])
    assert store.nbytes == 5 * A_TOKEN
    assert (store.found, store.missed) == (1, 1)


def test_the_least_recently_used_leaves_first() -> None:
    store, source = store_of(10), cache()
    for key in (b"a", b"b", b"c"):
        store.keep(key, source, range(3))
    store.restore(b"a", source, range(3))
    store.keep(b"d", source, range(4))  # b's place is too small for it, and c lies between that and the end
    assert [key in store for key in (b"a", b"b", b"c", b"d")] == [True, False, False, True]
    store.keep(b"e", source, range(3))
    assert store.nbytes == 10 * A_TOKEN
    store.keep(b"f", source, range(10))
    assert [key in store for key in (b"a", b"d", b"e", b"f")] == [False, False, False, True]


def test_a_block_larger_than_the_room_drives_nothing_out() -> None:
    store, source = store_of(4), cache()
    store.keep(b"a", source, range(4))
    store.keep(b"b", source, range(5))
    assert b"a" in store and b"b" not in store and store.nbytes == 4 * A_TOKEN


def test_blocks_of_any_length_keep_their_bits_whatever_leaves(poisoned: None) -> None:
    """Against a dictionary of copies; the room is full all the time, and no two blocks share a byte of it."""
    generator = np.random.default_rng(0)
    store = ContextStore(torch.empty(3000 + 25 * A_TOKEN, dtype=torch.uint8))
    known: dict[bytes, Tensor] = {}
    for step in range(300):
        key = bytes([int(generator.integers(40))])
        tokens = 1 + key[0] % 9
        kv_cache, start = cache(), int(generator.integers(20 - tokens))
        rows = range(start, start + tokens)
        if key in store:
            store.restore(key, kv_cache, rows)
            assert torch.equal(held(kv_cache, rows), known[key]), step
        else:
            known[key] = held(kv_cache, rows)
            store.keep(key, kv_cache, rows)
            assert key in store
        assert 0 < store.nbytes <= store.room.numel()
    assert store.found > 20 and store.missed > 20


def test_a_copy_that_fails_leaves_the_others_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    store, source = store_of(10), cache()
    store.keep(b"a", source, range(4))
    wanted = held(source, range(4))

    def fail(*_: object) -> Tensor:
        raise RuntimeError("CUDA error")

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", fail)
        with pytest.raises(RuntimeError, match="CUDA error"):
            store.keep(b"b", source, range(4))
    assert b"b" not in store and store.nbytes == 4 * A_TOKEN
    store.restore(b"a", source, range(8, 12))
    assert torch.equal(held(source, range(8, 12)), wanted)


def test_keys_tell_contexts_apart() -> None:
    keys = [
        NOTHING,
        key_after(NOTHING, b"text", b"ab"),
        key_after(NOTHING, b"text", b"a", b"b"),
        key_after(NOTHING, b"texta", b"b"),
        key_after(NOTHING, b"vit", b"ab"),
        key_after(key_after(NOTHING, b"text", b"a"), b"text", b"b"),
        key_after(key_after(NOTHING, b"text", b"b"), b"text", b"a"),
        key_after(NOTHING, b"text"),
        key_after(NOTHING, b"text", b""),
    ]
    assert len(set(keys)) == len(keys)
    assert key_after(NOTHING, b"text", b"ab") == keys[1]
