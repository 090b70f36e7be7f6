"""Contexts that repeat are not computed twice, and give the same bits as those that are."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import noise
from torch import Tensor

from lowmem_bagel import BagelPipeline, Result
from lowmem_bagel.errors import Cancelled
from lowmem_bagel.generation import inputs
from lowmem_bagel.model.decoder import Decoder
from lowmem_bagel.planner.plan import ContextRoom
from lowmem_bagel.runtime.context_store import ContextStore
from lowmem_bagel.runtime.loader import load_model

SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_timesteps": 2}
PICTURE, OTHER = (Image.fromarray(noise(40, 56, seed=seed)) for seed in (1, 2))
ALMOST = PICTURE.copy()
ALMOST.putpixel((55, 39), (1, 2, 3))

REQUESTS: tuple[Callable[[BagelPipeline], Result], ...] = (
    lambda pipe: pipe.ask("what is it?", PICTURE, max_new_tokens=3),
    lambda pipe: pipe.ask("what color is it?", PICTURE, max_new_tokens=3),
    lambda pipe: pipe.ask("what is it?", OTHER, max_new_tokens=3),
    lambda pipe: pipe.ask("what is it?", ALMOST, max_new_tokens=3),
    lambda pipe: pipe.edit(PICTURE, "make it red", seed=1, **SMALL),
    lambda pipe: pipe.edit(PICTURE, "make it red", seed=2, **SMALL),
    lambda pipe: pipe.edit(PICTURE, "make it blue and larger", seed=1, **SMALL | {"height": 64}),
    lambda pipe: pipe.edit(PICTURE, "make it red", seed=1, cfg_img_scale=1.0, **SMALL),
    lambda pipe: pipe.generate("a red circle", seed=3, **SMALL),
    lambda pipe: pipe.generate("a red circle", seed=4, **SMALL),
    lambda pipe: pipe.generate("a red circle", seed=4, think=True, max_think_tokens=4, **SMALL),
    lambda pipe: pipe.generate("a blue circle", seed=4, think=True, max_think_tokens=4, **SMALL),
    lambda pipe: pipe.ask("what is it?", PICTURE, think=True, max_new_tokens=3),
    lambda pipe: pipe.ask("what is it?", PICTURE, do_sample=True, seed=9, max_new_tokens=3),
    lambda pipe: pipe.run(["a", PICTURE, "b", OTHER, "c"], seed=1, **SMALL),
    lambda pipe: pipe.run(["a", PICTURE, "b", OTHER, "d"], seed=1, **SMALL),
    lambda pipe: pipe.run([PICTURE, OTHER, "c"], seed=1, **SMALL),
    lambda pipe: pipe.run([OTHER, PICTURE, "c"], seed=1, **SMALL),
)


def told(result: Result) -> object:
    return result.token_ids, result.text, None if result.latent is None else result.latent.tolist()


def loaded(model: BagelPipeline, dtype: str, room: ContextRoom | None) -> BagelPipeline:
    folder, plan = model.model.folder, model.model.plan
    plan = replace(plan, dtype=dtype, residual_dtype=dtype, context_store=room)
    return BagelPipeline(load_model(folder, plan))


def store_of(pipe: BagelPipeline) -> ContextStore:
    store = pipe.model.context_store
    assert store is not None
    return store


@pytest.fixture(scope="module")
def wanted_in(small_pictures: BagelPipeline) -> Callable[[str], list[object]]:
    """What the requests give without a store in a dtype."""

    @cache
    def wanted(dtype: str) -> list[object]:
        pipe = loaded(small_pictures, dtype, None)
        assert pipe.model.context_store is None
        return [told(request(pipe)) for request in REQUESTS]

    return wanted


@pytest.fixture
def keeping(small_pictures: BagelPipeline) -> Iterator[BagelPipeline]:
    pipe = loaded(small_pictures, "float32", ContextRoom("device", 1 << 24))
    yield pipe
    pipe.close()


@pytest.mark.parametrize(
    ("dtype", "room"),
    [
        ("float32", ContextRoom("device", 1 << 24)),
        ("bfloat16", ContextRoom("pageable", 1 << 24)),
        ("bfloat16", ContextRoom("device", 200_000)),
    ],
)
def test_every_request_gives_the_bits_that_it_gives_without_a_store(
    small_pictures: BagelPipeline, wanted_in: Callable[[str], list[object]], dtype: str, room: ContextRoom
) -> None:
    """In any order, and half of them again: with all that is kept from before, and with what a store too small for all
    still has."""
    pipe, wanted = loaded(small_pictures, dtype, room), wanted_in(dtype)
    generator = np.random.default_rng(0)
    half = len(REQUESTS) // 2
    for index in map(int, [*generator.permutation(len(REQUESTS)), *generator.permutation(len(REQUESTS))[:half]]):
        assert told(REQUESTS[index](pipe)) == wanted[index], index
    store = store_of(pipe)
    assert store.found > half
    assert 0 < store.nbytes <= room.nbytes


def test_nothing_that_repeats_is_computed(keeping: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the decoder nor the encoders see the picture again; it is not even resized."""
    shown = Image.fromarray(noise(48, 64))  # larger ones are made this small before they wait for their turn
    keeping.ask("what is it?", shown, max_new_tokens=2)
    for name in ("append_framed", "resize", "to_bytes"):
        monkeypatch.setattr(inputs, name, lambda *_, name=name: pytest.fail(name))
    passes = []
    forward = Decoder.forward

    def counted(*given: Any) -> list[Tensor]:
        passes.append(given[1][0].hidden.shape[1])
        return forward(*given)

    monkeypatch.setattr(Decoder, "forward", counted)
    question = "what color is it?"
    keeping.ask(question, shown.copy(), max_new_tokens=2)
    assert passes == [len(keeping.model.tokenizer.text_block(question)) + 1], "the question and the start, at once"
    passes.clear()
    question *= 25
    for _ in range(2):
        keeping.ask(question, shown, max_new_tokens=2)
    length = len(keeping.model.tokenizer.text_block(question))
    assert length > inputs.TOGETHER
    assert passes == [length, 1, 1], "a long question is kept"


def test_the_noise_that_a_picture_is_encoded_with_belongs_to_it(keeping: BagelPipeline) -> None:
    """Another seed is another latent; the same one again is the same, and draws as much from the generator."""
    edits = [keeping.edit(PICTURE, "make it red", seed=seed, **SMALL) for seed in (1, 2)]
    store = store_of(keeping)
    found = store.found
    assert found == 0
    again = keeping.edit(PICTURE, "make it red", seed=1, **SMALL)
    assert store.found == 3, "autoencoder's block, vision tower's, text"
    assert told(again) == told(edits[0]) != told(edits[1])


def test_a_prompt_drawn_again_and_a_system_prompt_are_kept(keeping: BagelPipeline) -> None:
    store = store_of(keeping)
    for seed in (1, 2):
        keeping.generate("a red circle", seed=seed, **SMALL)
    assert store.found == 1
    for prompt in ("a red circle", "a blue circle"):
        keeping.generate(prompt, think=True, max_think_tokens=3, **SMALL)
    assert store.found == 2, "what think says to every prompt"


def test_cancelled_and_failed_requests_leave_what_is_right(
    small_pictures: BagelPipeline, keeping: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [told(request(small_pictures)) for request in REQUESTS[:5]]
    with pytest.raises(Cancelled):
        keeping.edit(PICTURE, "make it red", seed=1, callback=lambda _: False, **SMALL)
    assert store_of(keeping).nbytes > 0
    whole = inputs.append_patches

    def fail(*given: Any) -> None:
        whole(*given)
        raise RuntimeError("broken off")

    with monkeypatch.context() as patched:
        patched.setattr(inputs, "append_patches", fail)
        with pytest.raises(RuntimeError, match="broken off"):
            keeping.ask("what is it?", PICTURE, max_new_tokens=3)
    assert [told(request(keeping)) for request in REQUESTS[:5]] == wanted


def test_values_that_were_never_written_are_never_kept(
    poisoned: None, small_pictures: BagelPipeline, keeping: BagelPipeline
) -> None:
    """Caches, and what is kept, are allocated as NaN."""
    for request in (*REQUESTS[:6], *REQUESTS[:6]):
        result = request(keeping)
        assert result.latent is None or result.latent.isfinite().all()
    store = store_of(keeping)
    for place in store._blocks.values():
        assert store.room[place.start : place.stop].view(torch.float32).isfinite().all()


def test_where_memory_runs_out_contexts_go_before_weights(
    keeping: BagelPipeline, small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = told(REQUESTS[4](small_pictures))
    keeping.ask("what is it?", PICTURE, max_new_tokens=2)
    whole, failures = inputs.append_framed, [torch.OutOfMemoryError("CUDA out of memory. Tried")]

    def once(*given: Any) -> None:
        if failures:
            raise failures.pop()
        whole(*given)

    monkeypatch.setattr(inputs, "append_framed", once)
    monkeypatch.setattr(type(keeping.model), "lower_residency", lambda *_: pytest.fail("weights first"))
    with pytest.warns(UserWarning, match=r"memory ran out .*; letting go of 0\.0 GB of kept contexts"):
        result = REQUESTS[4](keeping)
    assert told(result) == wanted
    assert keeping.model.context_store is None and keeping.model.plan.context_store is None
    assert keeping.model.plan.reasons["context store"] == "off: the device's memory ran out"
    assert told(REQUESTS[4](keeping)) == wanted, "computed, from now on"


@pytest.mark.parametrize("failing", [1, 2])
def test_memory_in_pieces_is_gathered_before_weights_leave(
    small_pictures: BagelPipeline, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Once: what does not fit then either needs room."""
    wanted, model, done = told(REQUESTS[4](small_pictures)), type(small_pictures.model), []
    whole, failures = inputs.append_framed, [torch.OutOfMemoryError("CUDA out of memory. Tried")] * failing

    def scarce(*given: Any) -> None:
        if failures:
            raise failures.pop()
        whole(*given)

    monkeypatch.setattr(inputs, "append_framed", scarce)
    monkeypatch.setattr(model, "bytes_in_pieces", lambda _: 1 << 30)
    monkeypatch.setattr(model, "return_pieces", lambda _: done.append("gathered"))
    monkeypatch.setattr(model, "lower_residency", lambda _, nbytes, card: done.append("weights") or nbytes)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert told(REQUESTS[4](small_pictures)) == wanted
    assert done == ["gathered", "weights"][:failing]
    reasons = ["free in pieces; beginning again", "GB more of the weights"][:failing]
    assert all(why in str(one.message) for why, one in zip(reasons, said, strict=True))


def test_contexts_in_ram_do_not_give_way_to_the_device(small_pictures: BagelPipeline) -> None:
    pipe = loaded(small_pictures, "float32", ContextRoom("pinned", 1 << 24))
    pipe.ask("what is it?", PICTURE, max_new_tokens=2)
    assert pipe.model.forget_contexts() == 0
    assert store_of(pipe).nbytes


def test_closing_lets_go(small_pictures: BagelPipeline) -> None:
    pipe = loaded(small_pictures, "float32", ContextRoom("device", 1 << 24))
    room = weakref.ref(store_of(pipe).room)
    pipe.ask("what is it?", PICTURE, max_new_tokens=2)
    assert room() is not None
    pipe.close()
    assert room() is None


def test_the_option(small_pictures: BagelPipeline) -> None:
    folder = small_pictures.model.folder.path
    pipe = BagelPipeline.from_pretrained(folder, device="cpu", context_store="30MB", tasks=("ask",))
    assert pipe.model.plan.context_store == ContextRoom("device", 30_000_000)
    assert store_of(pipe).room.numel() == 30_000_000
    assert BagelPipeline.from_pretrained(folder, device="cpu", tasks=("ask",)).model.context_store is None
