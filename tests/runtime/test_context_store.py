"""What is kept of contexts: the very bits, within its bytes, the least recently used leaving first."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from lowmem_bagel.checkpoint.config import DecoderConfig
from lowmem_bagel.model.kv_cache import KVCache
from lowmem_bagel.runtime.context_store import NOTHING, ContextStore, key_after

DECODER = DecoderConfig(16, 3, 4, 2, 32, 10, 1e6, 1e-6)
A_TOKEN = 2 * 3 * 2 * 4 * 2
"""Bytes in bfloat16: keys and values of three layers with two heads of four."""


def cache(tokens: int = 20) -> KVCache:
    made = KVCache(DECODER, tokens, torch.bfloat16, torch.device("cpu"))
    for values in (made.keys, made.values):
        values.copy_(torch.randn(values.shape))
    return made


def held(kv_cache: KVCache, rows: range) -> Tensor:
    return torch.stack((kv_cache.keys, kv_cache.values))[:, :, rows.start : rows.stop].clone()


@pytest.mark.parametrize("host", [False, True])
def test_a_block_comes_back_as_it_was_at_another_place(poisoned: None, host: bool) -> None:
    asked: list[int] = []

    def host_buffer(nbytes: int) -> Tensor:
        asked.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    store = ContextStore(1000, host_buffer if host else None)
    first, second = cache(), cache(30)
    wanted, around = held(first, range(3, 8)), held(second, range(30))
    store.keep(b"a", first, range(3, 8))
    first.keys.zero_()  # what is kept is a copy
    store.restore(b"a", second, range(11, 16))
    assert torch.equal(held(second, range(11, 16)), wanted)
    for rows in (range(11), range(16, 30)):
        assert torch.equal(held(second, rows), around[:, :, rows.start : rows.stop])
    assert store.nbytes == 5 * A_TOKEN
    assert asked == ([5 * A_TOKEN] if host else [])
    assert (store.found, store.missed) == (1, 1)


def test_the_buffer_itself_is_held() -> None:
    """Page-locked memory is unlocked when its own tensor goes, though views of it live on."""
    made: list[weakref.ref[Tensor]] = []

    def host_buffer(nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes + 8, dtype=torch.uint8)[:nbytes]
        made.append(weakref.ref(buffer))
        return buffer

    store = ContextStore(1000, host_buffer)
    store.keep(b"a", cache(), range(4))
    assert made[0]() is not None
    store.clear()
    assert made[0]() is None


def test_the_least_recently_used_leaves_first() -> None:
    store, source = ContextStore(10 * A_TOKEN), cache()
    for key in (b"a", b"b", b"c"):
        store.keep(key, source, range(3))
    store.restore(b"a", source, range(3))
    store.keep(b"d", source, range(4))
    assert [key in store for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert store.nbytes == 10 * A_TOKEN
    store.keep(b"e", source, range(10))
    assert [key in store for key in (b"a", b"c", b"d", b"e")] == [False, False, False, True]


def test_a_block_larger_than_the_store_drives_nothing_out() -> None:
    store, source = ContextStore(4 * A_TOKEN), cache()
    store.keep(b"a", source, range(4))
    store.keep(b"b", source, range(5))
    assert b"a" in store and b"b" not in store and store.nbytes == 4 * A_TOKEN


def test_memory_that_runs_out_while_a_block_is_kept_leaves_the_store_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    store, source = ContextStore(10 * A_TOKEN), cache()
    store.keep(b"a", source, range(4))
    wanted = held(source, range(4))

    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            store.keep(b"b", source, range(4))
    assert b"b" not in store and store.nbytes == 4 * A_TOKEN
    store.restore(b"a", source, range(8, 12))
    assert torch.equal(held(source, range(8, 12)), wanted)


def test_on_a_device_it_gives_way_and_keeps_half_from_then_on() -> None:
    store, source = ContextStore(10 * A_TOKEN), cache()
    assert store.give_way() == 0 and store.limit == 10 * A_TOKEN, "it held nothing that could have been in the way"
    store.keep(b"a", source, range(4))
    assert store.give_way() == 4 * A_TOKEN
    assert b"a" not in store and store.nbytes == 0 and store.limit == 5 * A_TOKEN
    in_ram = ContextStore(10 * A_TOKEN, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    in_ram.keep(b"a", source, range(4))
    assert in_ram.give_way() == 0 and b"a" in in_ram, "the device gains nothing by it"


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
