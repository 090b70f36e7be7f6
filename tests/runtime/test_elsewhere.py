"""Branches of guidance on other devices: the same pictures to the bit, whatever happens there."""

from __future__ import annotations

import gc
import threading
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
from support.threads import at_once

from lowmem_bagel import BagelPipeline, Result
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import Cancelled, CheckpointError, DeviceError, DoesNotFitError
from lowmem_bagel.model.decoder import Decoder
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.planner.plan import Launcher, Residency
from lowmem_bagel.runtime import loader
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


@pytest.fixture(scope="module", params=["thread", "request"])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    """Stand-ins are launched on by threads of their own; cards by the request's, which is forced on them here."""
    found: Launcher = request.param
    return found


@pytest.fixture(scope="module")
def two(folder: Path, launcher: Launcher) -> Iterator[BagelPipeline]:
    pipe = shared(folder, "cpu,cpu", launcher=launcher)
    yield pipe
    pipe.close()


@pytest.fixture(scope="module")
def three(folder: Path, launcher: Launcher) -> Iterator[BagelPipeline]:
    pipe = shared(folder, "cpu,cpu,cpu", launcher=launcher, tasks=("edit", "generate", "ask"))
    assert pipe.model.plan.branches == {"text": 1, "image": 2}
    yield pipe
    pipe.close()


@pytest.fixture(scope="module")
def wanted(alone: BagelPipeline) -> Any:
    return cache(lambda name: REQUESTS[name](alone))


@pytest.fixture
def fresh(folder: Path, launcher: Launcher) -> Iterator[BagelPipeline]:
    """Two devices of which one may be lost."""
    pipe = shared(folder, "cpu,cpu", launcher=launcher)
    yield pipe
    pipe.close()


@pytest.mark.parametrize(("count", "name"), ON_SEVERAL)
@pytest.mark.usefixtures("launcher")
def test_the_same_as_on_one_device(request: pytest.FixtureRequest, wanted: Any, count: int, name: str) -> None:
    pipe: BagelPipeline = request.getfixturevalue({2: "two", 3: "three"}[count])
    assert same(REQUESTS[name](pipe), wanted(name))


@pytest.fixture(scope="module")
def cached(alone: BagelPipeline) -> Any:
    return cache(lambda name: drawn_with(alone, name))


def drawn_with(pipe: BagelPipeline, name: str) -> Result:
    return pipe.generate("a red circle", **SMALL | {"num_timesteps": 14, "step_cache": name})


@pytest.mark.parametrize("name", [cache.name for cache in one_of_each_kind()])
def test_step_caches_live_with_their_branches(two: BagelPipeline, cached: Any, name: str) -> None:
    found = drawn_with(two, name)
    assert same(found, cached(name)), "and as many evaluations are computed, which the settings say"


@pytest.mark.parametrize("format", ARITHMETIC)
def test_every_format(folder: Path, small_variant_of: Callable[[str], Path], format: str) -> None:
    folder = folder if format == "source" else small_variant_of(format)
    options = {"dtype": ARITHMETIC[format], "backend": "native" if format == "int8" else "auto"}  # no trial of speed
    one, several = (shared(folder, devices, **options) for devices in ("cpu", "cpu,cpu"))
    assert same(REQUESTS["edit"](several), REQUESTS["edit"](one)), "which has all that a drawing has"
    several.close()


def test_through_the_memory_of_the_host(
    folder: Path, wanted: Any, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """In pieces that are smaller than what is sent, and keys begin as NaN."""
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", "peer")
    monkeypatch.setattr("lowmem_bagel.ops.exchange.PIECE_BYTES", 1000)
    pipe = shared(folder, "cpu,cpu")
    assert "switched off" in pipe.model.on_card(1).plan.reasons["exchange"]
    assert same(REQUESTS["edit"](pipe), wanted("edit"))
    pipe.close()


@pytest.mark.usefixtures("fake_cuda")
def test_streaming_on_either_device(folder: Path, wanted: Any) -> None:
    opened = ModelFolder.open(folder)
    plan = plan_for(opened, LoadOptions(devices="cpu,cpu", divide="guidance", dtype="float32"))
    units = tuple(plan_units(opened.config.decoder.num_layers))
    streamed = Residency(units, 3, "pageable")
    others = tuple(replace(other, residency=streamed) for other in plan.others)
    pipe = BagelPipeline(load_model(opened, replace(plan, residency=streamed, others=others)))
    assert pipe.model.on_card(1).residency.streamed == units
    assert same(REQUESTS["edit"](pipe), wanted("edit"))
    pipe.close()


def plan_units(layers: int) -> Iterator[tuple[int, Any]]:
    return ((layer, expert) for layer in range(layers) for expert in ("und", "gen"))


def test_what_only_the_first_needs_is_loaded_there_alone(two: BagelPipeline) -> None:
    there = two.model.on_card(1)
    assert there.vae is None and not there.staged
    for module in (there.bagel.lm_head, there.bagel.vision):
        assert all(tensor.is_meta for tensor in module.parameters())
    assert there.bagel.embed_tokens.is_meta
    assert there.tokenizer is two.model.tokenizer


def test_keys_are_copied_and_not_computed_again(two: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[tuple[bool, int]] = []
    forward = Decoder.forward

    def watched(self: Decoder, parts: Any, attend: Any) -> Any:
        passed.append((self is two.model.bagel.decoder, sum(part.hidden.shape[1] for part in parts)))
        return forward(self, parts, attend)

    monkeypatch.setattr(Decoder, "forward", watched)
    REQUESTS["edit"](two)
    assert passed and all(here for here, _ in passed)


def test_each_branch_is_launched_by_a_thread_of_its_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All begin before any is waited for."""
    three = shared(folder, "cpu,cpu,cpu", tasks=("edit",))
    assert [other.launcher for other in three.model.plan.others] == ["thread", "thread"]
    threads: set[str] = set()
    together = threading.Barrier(3)
    evaluate = Evaluator.velocities

    def watched(self: Evaluator, *given: Any) -> Any:
        threads.add(threading.current_thread().name)
        together.wait(20)
        assert torch.is_inference_mode_enabled()
        return evaluate(self, *given)

    monkeypatch.setattr(Evaluator, "velocities", watched)
    REQUESTS["edit"](three)
    assert {"lowmem-bagel-card-1_0", "lowmem-bagel-card-2_0"} < threads
    three.close()


def test_the_thread_of_the_request_launches_on_the_others_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have their work before the first one has its own, which the request goes on from."""
    three = shared(folder, "cpu,cpu,cpu", launcher="request", tasks=("edit",))
    cards = [three.model.on_card(card).bagel for card in range(3)]
    launched: list[int] = []
    evaluate, here = Evaluator.velocities, threading.get_ident()

    def watched(self: Evaluator, x: Any, time: Any, wanted: Any) -> Any:
        assert threading.get_ident() == here
        launched.append(cards.index(self.bagel))
        return evaluate(self, x, time, wanted)

    monkeypatch.setattr(Evaluator, "velocities", watched)
    REQUESTS["edit"](three)
    guided = sum(card == 2 for card in launched)
    assert guided > 1 and launched[: 3 * guided] == [1, 2, 0] * guided and {*launched[3 * guided :]} <= {0}
    three.close()


@pytest.mark.usefixtures("fake_cuda")
def test_weights_that_stream_from_now_on_are_launched_by_the_devices_thread(folder: Path, wanted: Any) -> None:
    pipe = shared(folder, "cpu,cpu", launcher="request")
    pipe.model.lower_residency(1, card=1)
    assert pipe.model.on_card(1).plan.launcher == "request", "nothing streams"
    pipe.close()
    opened = ModelFolder.open(folder)
    plan = plan_for(opened, LoadOptions(devices="cpu,cpu", divide="guidance", dtype="float32"))
    streamed = Residency(tuple(plan_units(opened.config.decoder.num_layers)), 3, "pageable")
    others = tuple(replace(other, residency=streamed, launcher="request") for other in plan.others)
    pipe = BagelPipeline(load_model(opened, replace(plan, guidance_batch=False, others=others)))
    pipe.model.lower_residency(1, card=1)
    there = pipe.model.on_card(1).plan
    assert there.launcher == "thread" and "weights that stream" in there.reasons["launches"]
    assert same(REQUESTS["generate"](pipe), wanted("generate"))
    pipe.close()


def test_steps_without_guidance_ask_nobody(two: BagelPipeline, alone: BagelPipeline) -> None:
    settings = {**SMALL, "cfg_interval": (0.9, 1.0)}
    assert same(two.generate("a red circle", **settings), alone.generate("a red circle", **settings))


def test_a_callback_stops_it(two: BagelPipeline, wanted: Any) -> None:
    with pytest.raises(Cancelled):
        two.generate("a red circle", callback=lambda step: step.index < 2, **SMALL)
    assert same(REQUESTS["generate"](two), wanted("generate"))


def failing(monkeypatch: pytest.MonkeyPatch, *errors: BaseException, after: int = 1) -> None:
    """Evaluations of other devices raise these, one each, after some went well."""
    evaluate, waiting, went = Evaluator.velocities, [*errors], [0]

    def watched(self: Evaluator, *given: Any) -> Any:
        if self.bagel.embed_tokens.is_meta:  # what only the first needs
            went[0] += 1
            if went[0] > after and waiting:
                raise waiting.pop(0)
        return evaluate(self, *given)

    monkeypatch.setattr(Evaluator, "velocities", watched)


def test_memory_that_runs_out_there_is_made_there(
    two: BagelPipeline, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered: list[tuple[bool, int]] = []

    def lower(self: LoadedModel, nbytes: int, card: int = 0) -> int:
        lowered.append((self is two.model, card))
        return two.model.others[card].thread.submit(lambda: nbytes).result()

    monkeypatch.setattr(LoadedModel, "lower_residency", lower)
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried"))
    with pytest.warns(UserWarning, match="the memory of cpu ran out .*; streaming 1.0 GB more of the weights"):
        assert same(REQUESTS["edit"](two), wanted("edit"))
    assert lowered == [(True, 1)]


def test_memory_that_cannot_be_made_there_is_said(two: BagelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadedModel, "out_of_memory", lambda self: f"out of memory of {self.plan.left_out}")
    failing(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried"))
    with pytest.raises(DoesNotFitError, match="embedding"):
        REQUESTS["generate"](two)


def test_a_device_that_fails_is_done_without(
    fresh: BagelPipeline, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = weakref.ref(fresh.model.on_card(1).bagel.decoder.layers[0]["gen"].qkv)
    failing(monkeypatch, RuntimeError("CUDA error: unspecified launch failure\nCompile with"))
    with pytest.warns(UserWarning, match=r"cpu failed \(CUDA error: unspecified launch failure\); going on without it"):
        assert same(REQUESTS["edit"](fresh), wanted("edit"))
    assert fresh.model.others == {}
    assert fresh.model.plan.reasons["cpu"] == "not used any more: CUDA error: unspecified launch failure"
    gc.collect()
    assert there() is None, "its memory is given back"
    assert same(REQUESTS["edit"](fresh), wanted("edit"))


def test_a_broken_device_does_not_keep_the_memory_of_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = shared(folder, "cpu,cpu,cpu", tasks=("edit",))
    broken, weights = pipe.model.on_card(1), weakref.ref(pipe.model.residency._held[0, "gen"].buffer)
    whole = LoadedModel.close

    def close(self: LoadedModel) -> None:
        if self is broken:
            raise RuntimeError("CUDA error: device lost")
        whole(self)

    monkeypatch.setattr(LoadedModel, "close", close)
    pipe.close()
    gc.collect()
    assert weights() is None and pipe.model.plan.reasons["closing cpu"] == "CUDA error: device lost"


@pytest.mark.parametrize("error", [CheckpointError("a shard vanished"), RuntimeError("a shape is wrong")])
def test_other_errors_come_as_they_are(
    two: BagelPipeline, wanted: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with monkeypatch.context() as patched:
        failing(patched, error)
        with pytest.raises(type(error)) as found:
            REQUESTS["edit"](two)
        assert found.value is error
    assert same(REQUESTS["edit"](two), wanted("edit"))


def test_two_pipelines_in_two_threads(folder: Path, launcher: Launcher, two: BagelPipeline, wanted: Any) -> None:
    other = shared(folder, "cpu,cpu", launcher=launcher)
    found = at_once([lambda pipe=pipe: [REQUESTS["edit"](pipe) for _ in range(2)] for pipe in (two, other)])
    for results in found:
        assert isinstance(results, list), results
        assert all(isinstance(result, Result) and same(result, wanted("edit")) for result in results)
    other.close()


def test_closing_gives_back_all_memory_and_threads(folder: Path) -> None:
    pipe = shared(folder, "cpu,cpu,cpu", tasks=("edit",))
    REQUESTS["edit"](pipe)
    weights = [weakref.ref(pipe.model.on_card(card).residency._held[0, "gen"].buffer) for card in range(3)]
    assert all(buffer() is not None for buffer in weights)
    threads = [thread for other in pipe.model.others.values() for thread in other.thread._worker._threads]
    assert len(threads) == 2
    pipe.close()
    gc.collect()
    assert not any(buffer() for buffer in weights)
    assert pipe.model.others == {} and not any(thread.is_alive() for thread in threads)


def test_a_load_that_fails_on_another_device_lets_go_of_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    fill = loader._Loading._fill

    def failing_fill(self: Any, *given: Any) -> Any:
        if self.plan.left_out:
            raise CheckpointError("injected")
        made.append(weakref.ref(self.folder))
        result = fill(self, *given)
        made.append(weakref.ref(result[0]._held[0, "gen"].buffer))
        return result

    monkeypatch.setattr(loader._Loading, "_fill", failing_fill)
    with pytest.raises(CheckpointError, match="injected"):
        shared(folder, "cpu,cpu")
    gc.collect()
    assert made[1]() is None


@pytest.mark.parametrize(
    ("error", "wanted", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried"),
            DoesNotFitError,
            "the memory of cpu ran out while .* Tried",
        ),
        (
            RuntimeError("CUDA error: device lost"),
            DeviceError,
            "cpu failed while the model was loaded: CUDA error: device",
        ),
    ],
)
def test_a_card_that_fails_while_it_loads_is_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, wanted: type[Exception], said: str
) -> None:
    fill = loader._Loading._fill

    def failing_fill(self: Any, *given: Any) -> Any:
        if self.plan.left_out:
            raise error
        return fill(self, *given)

    monkeypatch.setattr(loader._Loading, "_fill", failing_fill)
    with pytest.raises(wanted, match=said):
        shared(folder, "cpu,cpu")


def test_progress_is_of_all_devices(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    pipe = BagelPipeline.from_pretrained(
        folder, devices="cpu,cpu", divide="guidance", dtype="float32", progress=lambda *now: told.append(now)
    )
    done = [now for now, _ in told]
    assert done == sorted(done) and {total for _, total in told} == {told[0][1]}
    assert told[0][1] / 2 < done[-1] <= told[0][1]
    pipe.close()
