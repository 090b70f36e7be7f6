"""Memory given back and taken again, against the stand-in for ComfyUI's management on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.comfy import Comfy
from support.comfy_memory import RESERVED, Management, Other, managed
from support.streaming import fake_cuda as fake_cuda

from lowmem_bagel import BagelPipeline
from lowmem_bagel.errors import CheckpointError, DoesNotFitError, PipelineClosedError
from lowmem_bagel.hardware.profile import CONTEXT_BYTES, HardwareProfile
from lowmem_bagel.integrations.comfyui import models
from lowmem_bagel.integrations.comfyui.memory import ManagedModel
from lowmem_bagel.planner import estimate
from lowmem_bagel.planner.plan import Plan
from lowmem_bagel.runtime.loaded import LoadedModel
from lowmem_bagel.runtime.memory_promise import PROMISES

QUICK = {"prompt": "a red circle", "width": 32, "height": 32, "seed": 3, "settings": {"num_timesteps": 3}}
GB = 1_000_000_000


@pytest.fixture
def management(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Management]:
    made = managed(monkeypatch, 10 * GB)
    yield made
    made.unload_all_models()


def loaded(comfy: Comfy, **options: Any) -> ManagedModel:
    (model,) = comfy.run("LowmemBagelLoad", name=models.DEMO, **options)
    assert isinstance(model, ManagedModel)
    return model


def drawn(comfy: Comfy, model: ManagedModel) -> torch.Tensor:
    image: torch.Tensor = comfy.run("LowmemBagelTextToImage", model=model, **QUICK)[0]
    return image


def alive() -> int:
    """Bytes of tensors that are there."""
    gc.collect()
    tensors = [
        thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu"
    ]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_it_is_on_the_list_while_it_is_loaded(comfy: Comfy, management: Management) -> None:
    model = loaded(comfy)
    assert [entry.patcher for entry in management.loaded] == [model]
    assert 1_000_000 < model.loaded_size() == model.model_size()
    assert model.current_loaded_device() == model.load_device
    drawn(comfy, model)
    assert [entry.patcher for entry in management.loaded] == [model], "once, however often it is used"
    assert model.model.pipeline is not None, "and it was not loaded anew for it"


def test_it_gives_all_back_and_takes_it_again(comfy: Comfy, management: Management) -> None:
    model = loaded(comfy)
    before, pipeline = drawn(comfy, model), model.model.pipeline
    management.unload_all_models()
    assert model.loaded_size() == 0 and model.model_size() > 0 and not management.loaded
    assert pipeline is not None
    with pytest.raises(PipelineClosedError):
        pipeline.generate("a red circle")
    assert torch.equal(drawn(comfy, model), before)
    assert model.model.pipeline is not pipeline


def test_what_others_have_is_freed_by_comfyui_alone(comfy: Comfy, management: Management) -> None:
    other = Other(9 * GB + GB // 2, management.device)
    management.load_models_gpu([other])
    model = loaded(comfy)
    assert not other.there, "the planned peak did not fit beside it, so it was asked for"
    assert [call for call in management.log if call[0] == "unload"] == [("unload", "Weights")]
    management.load_models_gpu([other])
    assert other.there and model.loaded_size() == 0, "and now the other one needs the card"
    small = Other(GB, management.device)
    management.unload_all_models()
    management.load_models_gpu([small])
    drawn(comfy, model)
    assert small.there and model.loaded_size() > 0, "what fits stays"


def test_two_graphs_in_a_row_come_back_to_the_same_memory(comfy: Comfy, management: Management) -> None:
    other = Other(10 * GB - 2000, management.device)

    def graph() -> int:
        model = loaded(comfy)
        drawn(comfy, model)
        management.load_models_gpu([other])
        drawn(comfy, model)
        return alive()

    graph()  # once more than counted, for what is kept for good
    first, second = graph(), graph()
    assert second == first
    assert not [entry for entry in management.loaded if isinstance(entry.patcher, ManagedModel)]


def test_a_model_that_nobody_has_any_more_is_closed(comfy: Comfy, management: Management) -> None:
    model = loaded(comfy)
    pipeline = model.model.pipeline
    del model
    gc.collect()
    assert not management.loaded
    assert pipeline is not None
    with pytest.raises(PipelineClosedError):
        pipeline.generate("a red circle")


def test_what_cannot_be_loaded_leaves_nothing_behind(
    comfy: Comfy, management: Management, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    promises = len(PROMISES._held)
    with monkeypatch.context() as broken:
        broken.setattr("lowmem_bagel.integrations.comfyui.memory.load_model", refuse)
        with pytest.raises(CheckpointError, match="made up"):
            loaded(comfy)
    assert not management.loaded and len(PROMISES._held) == promises
    loaded(comfy)


def refuse(*_: Any) -> LoadedModel:
    raise CheckpointError("made up")


def test_a_limit_of_ours_does_not_bind_comfyui(comfy: Comfy, management: Management) -> None:
    """torch's allocator has one limit for the process; there is none while one that uses the card promises nothing."""
    model = loaded(comfy, max_vram="8GB")
    assert [p.max_vram for p in PROMISES._held if p is model.model.promise] == [None]
    management.unload_all_models()
    assert model.model.promise is None


@dataclass
class Carried:
    """Stands for a model that was loaded on a card: the plan, and what was given back of it afterwards."""

    plan: Plan
    weight_bytes: int = 100_000_000
    given_back: list[int] = field(default_factory=list)
    keepers: set[Any] = field(default_factory=set)

    def lower_residency(self, nbytes: int) -> int:
        self.given_back.append(nbytes)
        return nbytes

    def forget_contexts(self) -> int:
        return 0

    def on_device(self) -> Any:
        return nullcontext()

    def close(self) -> None:
        pass


@pytest.fixture
def card(comfy: Comfy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Management]:
    """A card of 4 GiB that ComfyUI manages; what is loaded on it is only planned."""
    machine = HardwareProfile.hypothetical(4, (8, 9), 32, 25)
    monkeypatch.setattr(estimate, "this_machine", lambda name: replace(machine, assumed=False))
    monkeypatch.setattr("lowmem_bagel.integrations.comfyui.memory.load_model", lambda folder, plan, *_: Carried(plan))
    made = managed(monkeypatch, 4 << 30, "cuda:0")
    yield made
    made.unload_all_models()


def planned(comfy: Comfy) -> tuple[Plan, list[int]]:
    """How it is loaded, and how much of it is given back afterwards."""
    model = loaded(comfy)
    pipeline = model.model.pipeline
    assert pipeline is not None and isinstance(pipeline.model, Carried)
    return pipeline.model.plan, pipeline.model.given_back


def of_plan(plan: Plan) -> int:
    """Bytes of the card beside the context."""
    assert plan.prediction is not None
    return plan.prediction.peak_bytes - CONTEXT_BYTES


def test_the_first_load_is_planned_for_comfyuis_budget(comfy: Comfy, card: Management) -> None:
    plan, _ = planned(comfy)
    assert not plan.residency.streamed, "there is room for all of it"
    whole = of_plan(plan)
    card.unload_all_models()
    card.budget = ManagedModel(models.DEMO_FOLDER, {}).model_size() - 10_000_000
    plan, given_back = planned(comfy)
    assert plan.residency.streamed and of_plan(plan) <= whole - 10_000_000
    assert not given_back, "the plan itself keeps to it"


def test_what_comfyui_keeps_free_is_no_ones(comfy: Comfy, card: Management, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--reserve-vram`, and `--highvram`, which sets no budget."""
    card.budget = 1e32
    whole = of_plan(planned(comfy)[0])
    card.unload_all_models()
    from comfy import model_management

    monkeypatch.setattr(model_management, "extra_reserved_memory", lambda: card.total - whole + 10_000_000)
    plan, _ = planned(comfy)
    assert plan.residency.streamed and of_plan(plan) <= whole - 10_000_000


def test_a_card_that_is_too_small_is_told_in_a_line(comfy: Comfy, card: Management) -> None:
    card.total = 100_000_000
    with pytest.raises(DoesNotFitError, match=r"needs [0-9.]+ GB of GPU memory, and [0-9]+ MB may be used; ") as told:
        loaded(comfy)
    assert "\n" not in str(told.value) and not card.loaded


def test_under_novram_all_is_given_back_that_streams(comfy: Comfy, card: Management) -> None:
    """No plan has no weights on the card: then the fastest is carried out, and lowered."""
    card.budget = 0.1
    plan, given_back = planned(comfy)
    assert not plan.residency.streamed and given_back == [99_999_999]


@pytest.mark.usefixtures("fake_cuda")
def test_units_stream_while_another_needs_the_memory_and_come_back(
    comfy: Comfy, management: Management, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processor plays the card: what is resident counts as on it, and the rest as in RAM."""
    monkeypatch.setattr(LoadedModel, "weight_bytes", property(resident_bytes))
    monkeypatch.setattr(LoadedModel, "lower_residency", lambda self, nbytes: self.residency.demote(nbytes))
    monkeypatch.setattr(LoadedModel, "raise_residency", lambda self, nbytes: self.residency.promote(nbytes))
    monkeypatch.setattr(ManagedModel, "model_size", whole_bytes)
    model = loaded(comfy)
    pipeline = model.model.pipeline
    assert pipeline is not None
    before, whole = drawn(comfy, model), model.loaded_size()
    short = whole // 3
    management.total = 3 * whole
    other = Other(int((2 * whole + short - RESERVED) / 1.1), management.device)
    monkeypatch.setattr(model, "_working", 0)
    management.load_models_gpu([other])
    assert other.there and 0 < model.loaded_size() <= whole - short, "some of it streams, the rest stays"
    assert model.model.pipeline is pipeline, "nothing was loaded anew"
    other.detach()
    assert torch.equal(drawn(comfy, model), before)
    assert model.loaded_size() == whole and not pipeline.model.residency.streamed, "and all of it is back"


def test_where_another_took_the_memory_meanwhile_units_stream_on(
    comfy: Comfy, management: Management, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(comfy)
    pipeline = model.model.pipeline
    assert pipeline is not None

    def none_left(self: BagelPipeline, nbytes: int) -> int:
        raise torch.OutOfMemoryError("made up. And so on")

    monkeypatch.setattr(BagelPipeline, "raise_residency", none_left)
    monkeypatch.setattr(type(pipeline.model.residency), "streamed", ((0, "und"),))
    assert model.partially_load(model.load_device, GB) == 0
    assert "another took the memory: made up" in pipeline.model.plan.reasons["residency"]


def resident_bytes(model: LoadedModel) -> int:
    held = model.residency._held
    return sum(held[unit].layout.nbytes for unit in model.residency.resident)


def whole_bytes(model: ManagedModel) -> int:
    pipeline = model.model.pipeline
    return 0 if pipeline is None else sum(held.layout.nbytes for held in pipeline.model.residency._held.values())
