"""Layers divided over several devices: the same pictures and answers to the bit, each layer's weights and keys on its
own device, and what happens when one of them has trouble."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cards import ARITHMETIC
from support.devices import BRIEF as REQUESTS
from support.devices import ON_SEVERAL, SMALL, same, shared
from support.kinds import one_of_each_kind

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import DeviceError, DoesNotFitError, PipelineClosedError
from lowmem_bagel.generation.inputs import Contexts
from lowmem_bagel.model.decoder import ExpertLayer
from lowmem_bagel.model.kv_cache import DividedCache
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.planner.plan import Residency
from lowmem_bagel.runtime.loaded import LoadedModel
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.sampling.evaluating import Evaluator
from lowmem_bagel.settings import LoadOptions


@pytest.fixture(scope="module")
def folder(small_pictures: BagelPipeline) -> Path:
    return small_pictures.model.folder.path


@pytest.fixture(scope="module")
def alone(folder: Path) -> BagelPipeline:
    return shared(folder, "cpu")


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[BagelPipeline]:
    pipe = shared(folder, "cpu,cpu", divide="layers")
    yield pipe
    pipe.close()


@pytest.fixture(scope="module")
def three(folder: Path) -> Iterator[BagelPipeline]:
    pipe = shared(folder, "cpu,cpu,cpu", divide="layers")
    yield pipe
    pipe.close()


@pytest.fixture(scope="module")
def wanted(alone: BagelPipeline) -> Any:
    return cache(lambda name: REQUESTS[name](alone))


def all_of(pipe: BagelPipeline) -> list[LoadedModel]:
    return [pipe.model.on_card(card) for card in range(1 + len(pipe.model.others))]


@pytest.mark.parametrize(("count", "name"), ON_SEVERAL)
def test_the_same_as_on_one_device(request: pytest.FixtureRequest, wanted: Any, count: int, name: str) -> None:
    pipe: BagelPipeline = request.getfixturevalue({2: "two", 3: "three"}[count])
    assert same(REQUESTS[name](pipe), wanted(name))


def test_in_one_batch_too(folder: Path, two: BagelPipeline) -> None:
    pipe = BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32")
    assert pipe.model.plan.guidance_batch
    two.model.plan = replace(two.model.plan, guidance_batch=True)
    try:
        assert same(REQUESTS["edit"](two), REQUESTS["edit"](pipe))
    finally:
        two.model.plan = replace(two.model.plan, guidance_batch=False)


@pytest.mark.parametrize("name", [cache.name for cache in one_of_each_kind()])
def test_step_caches(three: BagelPipeline, alone: BagelPipeline, name: str) -> None:
    settings = {**SMALL, "num_timesteps": 14, "step_cache": name}
    assert same(three.generate("a red circle", **settings), alone.generate("a red circle", **settings))


@pytest.mark.parametrize("format", ["int8", "dfloat11"])
def test_other_formats(small_variant_of: Callable[[str], Path], format: str) -> None:
    folder = small_variant_of(format)
    options = {"dtype": ARITHMETIC[format], "backend": "native" if format == "int8" else "auto"}
    one, several = shared(folder, "cpu", **options), shared(folder, "cpu,cpu", divide="layers", **options)
    for name in ("generate", "answer"):
        assert same(REQUESTS[name](several), REQUESTS[name](one))
    several.close()


def test_each_device_holds_its_own_layers(three: BagelPipeline) -> None:
    models = all_of(three)
    assert [{layer for layer, _ in model.residency._held} for model in models] == [{0}, {1}, {2}]
    for number, model in enumerate(models):
        meta = [all(tensor.is_meta for tensor in layer.parameters()) for layer in model.bagel.decoder.layers]
        assert meta == [layer != number for layer in range(3)]
    assert models[1].vae is None and models[1].bagel.embed_tokens.is_meta


def test_keys_stay_where_their_layer_is(three: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[DividedCache] = []
    whole = Contexts.__init__

    def watched(self: Contexts, *given: Any, **named: Any) -> None:
        whole(self, *given, **named)
        assert isinstance(self.kv_cache, DividedCache)
        made.append(self.kv_cache)

    monkeypatch.setattr(Contexts, "__init__", watched)
    REQUESTS["generate"](three)
    (divided,) = made
    assert [own.keys.shape[0] for own in divided._caches] == [1, 1, 1]
    assert {own.capacity for own in divided._caches} == {divided.capacity}


def test_a_cache_that_grows_does_so_on_every_device(three: BagelPipeline) -> None:
    found = three.model.bagel.kv_cache(5)
    found.grow(3)
    assert found.capacity == 8
    k = torch.randn(2, *found._caches[0].keys.shape[2:])
    for layer in range(3):
        found.write(layer, 6, k, k)
        assert torch.equal(found.read(layer, [range(6, 8)])[0][0], k)


def test_no_branch_waits_for_the_one_before(
    two: BagelPipeline, alone: BagelPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are on their way before the first one's hidden states are asked for; on one device each ends first, since
    what they give would only take memory."""
    order: list[str] = []
    for name in ("_begin", "_end"):
        whole = getattr(Evaluator, name)
        monkeypatch.setattr(Evaluator, name, lambda *given, n=name, f=whole: order.append(n) or f(*given))
    REQUESTS["edit"](two)
    assert order[:6] == ["_begin"] * 3 + ["_end"] * 3
    order.clear()
    REQUESTS["edit"](alone)
    assert order[:6] == ["_begin", "_end"] * 3


def test_through_the_memory_of_the_host(
    folder: Path, wanted: Any, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", "peer")
    monkeypatch.setattr("lowmem_bagel.ops.exchange.PIECE_BYTES", 1000)
    pipe = shared(folder, "cpu,cpu,cpu", divide="layers")
    for name in ("edit", "answer"):
        assert same(REQUESTS[name](pipe), wanted(name))
    pipe.close()


@pytest.mark.usefixtures("fake_cuda")
def test_layers_that_stream_on_their_device(folder: Path, wanted: Any) -> None:
    opened = ModelFolder.open(folder)
    plan = plan_for(opened, LoadOptions(devices="cpu,cpu", divide="layers", dtype="float32"))
    each = []
    for own in (plan, *plan.others):
        units = tuple((layer, expert) for layer in range(*own.layers) for expert in ("und", "gen"))
        each.append(replace(own, residency=Residency(units, 3, "pageable"), guidance_batch=False))
    pipe = BagelPipeline(load_model(opened, replace(each[0], others=tuple(each[1:]))))
    assert sum(len(model.residency.streamed) for model in all_of(pipe)) == 6
    for name in ("edit", "answer"):
        assert same(REQUESTS[name](pipe), wanted(name))
    pipe.close()


def failing(monkeypatch: pytest.MonkeyPatch, pipe: BagelPipeline, error: BaseException) -> None:
    """A layer of the second device raises this once."""
    theirs = {id(layer) for layers in pipe.model.on_card(1).bagel.decoder.layers for layer in layers.values()}
    whole, waiting = ExpertLayer.project, [error]

    def watched(self: ExpertLayer, *given: Any) -> None:
        if id(self) in theirs and waiting:
            raise waiting.pop()
        whole(self, *given)

    monkeypatch.setattr(ExpertLayer, "project", watched)


def test_memory_that_runs_out_there_is_made_there(
    two: BagelPipeline, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered: list[int] = []
    monkeypatch.setattr(LoadedModel, "lower_residency", lambda self, n, card=0: lowered.append(card) or n)
    failing(monkeypatch, two, torch.OutOfMemoryError("CUDA out of memory. Tried"))
    with pytest.warns(UserWarning, match="the memory of cpu ran out"):
        assert same(REQUESTS["edit"](two), wanted("edit"))
    assert lowered == [1]


def test_a_device_that_fails_closes_the_pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = shared(folder, "cpu,cpu", divide="layers")
    weights = [weakref.ref(next(iter(model.residency._held.values())).buffer) for model in all_of(pipe)]
    failing(monkeypatch, pipe, RuntimeError("CUDA error: unspecified launch failure\nCompile with"))
    said = (
        "cpu, which has some of the layers, failed: CUDA error: unspecified launch failure; load the model without it"
    )
    with pytest.raises(DeviceError, match=said):
        REQUESTS["edit"](pipe)
    gc.collect()
    assert not any(buffer() for buffer in weights)
    with pytest.raises(PipelineClosedError):
        REQUESTS["edit"](pipe)
    pipe.close()


def test_a_fault_of_ours_comes_as_it_is(two: BagelPipeline, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        failing(patched, two, RuntimeError("a shape is wrong"))
        with pytest.raises(RuntimeError, match="a shape is wrong"):
            REQUESTS["edit"](two)
    assert same(REQUESTS["edit"](two), wanted("edit"))


def test_accelerate_gives_the_same_in_turn(folder: Path, wanted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline of the benchmarks."""
    pipe = BagelPipeline.from_pretrained(
        folder, devices="cpu,cpu", divide="layers", dtype="float32", offload="accelerate"
    )
    pipe.model.plan = replace(pipe.model.plan, guidance_batch=False)
    assert [type(stretch).__name__ for stretch in pipe.model.bagel.decoder.elsewhere] == ["AccelerateStretch"]
    order: list[str] = []
    for name in ("_begin", "_end"):
        whole = getattr(Evaluator, name)
        monkeypatch.setattr(Evaluator, name, lambda *given, n=name, f=whole: order.append(n) or f(*given))
    assert same(REQUESTS["edit"](pipe), wanted("edit"))
    assert order[:4] == ["_begin", "_end"] * 2
    pipe.close()


def test_text_is_decoded_without_a_graph(two: BagelPipeline) -> None:
    assert two.model.step_kernels is None and two.model.short_passes is None
    assert two.model.plan.reasons["text decoding by graph"] == "layers are on several cards"


def test_more_devices_than_layers(folder: Path) -> None:
    with pytest.raises(DoesNotFitError, match="divide layers"):
        shared(folder, "cpu,cpu,cpu,cpu", divide="layers")
