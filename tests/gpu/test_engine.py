"""The engine on a real GPU: streamed, limited and compressed runs give the resident run's bits; nothing leaks."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lowmem_bagel.converters.engine.registry import convert_folder
from support.paths import CHECKPOINT
from support.streaming import ACCELERATE

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import Cancelled, CheckpointError
from lowmem_bagel.ops.errors import relative_l2
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.planner.plan import ContextRoom, Place, Plan, Residency
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.runtime.streaming.layers import BufferedSource, MixedSource, PinnedSource
from lowmem_bagel.runtime.streaming.pinned import _forget_last_error, pinned_buffer
from lowmem_bagel.settings import LoadOptions

pytestmark = pytest.mark.gpu

UNITS = tuple((layer, expert) for layer in range(3) for expert in ("und", "gen"))
DRAWING = {"height": 64, "width": 96, "seed": 3, "num_timesteps": 5}


def pipeline(folder: Path, **changes: object) -> BagelPipeline:
    opened = ModelFolder.open(folder)
    plan: Plan = replace(plan_for(opened, LoadOptions(device="cuda", dtype="bfloat16")), **changes)
    return BagelPipeline(load_model(opened, plan))


def drawn(pipe: BagelPipeline, **changed: object) -> torch.Tensor:
    latent = pipe.generate("a red circle", **DRAWING | changed).latent
    assert latent is not None and latent.isfinite().all()
    return latent


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("variants")
    for name in ("dfloat11", "int8", "nf4", "gguf-q8_0"):
        convert_folder(CHECKPOINT, out / name, name)
    return {"source": CHECKPOINT} | {name: out / name for name in ("dfloat11", "int8", "nf4", "gguf-q8_0")}


@pytest.mark.parametrize("source", ["pinned", "pageable", "disk"])
@pytest.mark.parametrize("streamed", [UNITS, UNITS[::2], UNITS[:1]])
@pytest.mark.parametrize("format", ["source", "dfloat11", "int8", "nf4", "gguf-q8_0"])
def test_streamed_equals_resident(variants: dict[str, Path], format: str, streamed: tuple, source: str) -> None:
    resident = pipeline(variants[format], guidance_batch=True, residency=Residency())
    held = Residency(streamed, 2, source, ("vit", "vae", "lm_head", "embedding"))
    limited = pipeline(variants[format], guidance_batch=True, residency=held)
    assert isinstance(limited.model.bagel.decoder.source.source, PinnedSource if source == "pinned" else BufferedSource)
    assert torch.equal(drawn(limited), drawn(resident))
    question = ("what is this?", CHECKPOINT.parent / "cases" / "edit_0.png")
    ask = {"max_new_tokens": 12}
    assert limited.ask(*question, **ask).token_ids[:4] == resident.ask(*question, **ask).token_ids[:4]
    assert torch.equal(drawn(limited), drawn(resident)), "after a pass that used und alone"


@pytest.mark.parametrize("place", ["device", "pinned", "pageable"])
@pytest.mark.parametrize("residency", [Residency(), Residency(UNITS[::2], 2, "pinned", ("vit", "vae"))])
def test_kept_contexts_give_the_same_bits(residency: Residency, place: Place) -> None:
    pipe = pipeline(CHECKPOINT, residency=residency, context_store=ContextRoom(place, 1 << 28))
    without = pipeline(CHECKPOINT, residency=residency)
    picture, other = (CHECKPOINT.parent / "cases" / name for name in ("edit_0.png", "ask_0.png"))
    for _ in range(2):
        for shown, question in ((picture, "what is this?"), (picture, "what color is it?"), (other, "what is this?")):
            ask = {"max_new_tokens": 24}
            assert pipe.ask(question, shown, **ask).token_ids == without.ask(question, shown, **ask).token_ids
        for seed in (1, 2):
            settings = DRAWING | {"seed": seed}
            ours, theirs = (p.edit(picture, "make it red", **settings).latent for p in (pipe, without))
            assert ours is not None and theirs is not None and torch.equal(ours, theirs)
    store = pipe.model.context_store
    assert store is not None and store.found > store.missed
    assert store.room.is_cuda == (place == "device")
    assert "pinning" not in pipe.model.plan.reasons  # torch's is_pinned knows only of what torch has locked


def test_contexts_on_the_device_go_when_its_memory_runs_out() -> None:
    pipe = pipeline(CHECKPOINT, context_store=ContextRoom("device", 1 << 28))
    picture = CHECKPOINT.parent / "cases" / "edit_0.png"
    wanted = pipe.ask("what is this?", picture, max_new_tokens=24).token_ids
    before = torch.cuda.memory_allocated()
    assert pipe.model.forget_contexts() == 1 << 28
    assert before - torch.cuda.memory_allocated() >= 1 << 28
    assert pipe.ask("what is this?", picture, max_new_tokens=24).token_ids == wanted


@pytest.mark.parametrize("staged", [(), ("vit", "vae", "lm_head", "embedding")])
def test_previews_change_no_bit(staged: tuple[str, ...]) -> None:
    pipe = pipeline(CHECKPOINT, residency=Residency(UNITS, 2, "pinned", staged))
    sizes = []
    shown = drawn(pipe, callback=lambda step: sizes.append(step.preview().image().size))
    assert torch.equal(shown, drawn(pipe))
    assert sizes == [(12, 8)] * 4


@pytest.mark.parametrize("off", ["triton", "triton,bf16"])
@pytest.mark.parametrize("format", ["source", "dfloat11", "int8", "nf4", "gguf-q8_0"])
def test_streamed_equals_resident_without_triton(
    variants: dict[str, Path], format: str, off: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the kernels that need none, in bf16 and in fp16 arithmetic."""
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", off)
    old = {"dtype": "float16", "residual_dtype": "float32", "vae_dtype": "float32"} if "bf16" in off else {}
    resident = pipeline(variants[format], guidance_batch=True, residency=Residency(), **old)
    limited = pipeline(variants[format], guidance_batch=True, residency=Residency(UNITS[::2], 2, "pinned"), **old)
    assert "elementwise kernels" not in limited.model.plan.reasons
    assert torch.equal(drawn(limited), drawn(resident))


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("format", ["source", "dfloat11", "int8", "nf4", "gguf-q8_0"])
def test_units_from_disk_beside_pinned_ones_equal_resident(variants: dict[str, Path], format: str, slots: int) -> None:
    """Buffered copies have a stream of their own there, and a slot's last owner may have come by the other."""
    held = Residency(UNITS, slots, "pinned", pageable=UNITS[1:2], disk=UNITS[::3])
    limited = pipeline(variants[format], guidance_batch=True, residency=held)
    assert isinstance(limited.model.bagel.decoder.source.source, MixedSource)
    assert {place: len(units) for place, units in held.waiting().items()} == {"pinned": 3, "pageable": 1, "disk": 2}
    wanted = drawn(pipeline(variants[format], guidance_batch=True, residency=Residency()))
    for _ in range(3):
        assert torch.equal(drawn(limited), wanted)


def test_passes_that_end_early_stream_alike() -> None:
    cache = {"num_timesteps": 12, "step_cache": "first-block", "step_cache_threshold": 0.1}
    resident = pipeline(CHECKPOINT, guidance_batch=True)
    settings = resident.generate("a red circle", **DRAWING | cache).settings
    assert settings["evaluations_computed"] < settings["evaluations"]
    limited = pipeline(CHECKPOINT, guidance_batch=True, residency=Residency(UNITS, 3, "pinned"))
    assert torch.equal(drawn(limited, **cache), drawn(resident, **cache))


@pytest.mark.parametrize("format", ["source", "int8"])
def test_accelerate_equals_resident(variants: dict[str, Path], format: str) -> None:
    held = Residency(UNITS[::2], 2, "pinned")
    moved = pipeline(variants[format], guidance_batch=True, residency=held, offload=ACCELERATE)
    assert torch.equal(drawn(moved), drawn(pipeline(variants[format], guidance_batch=True)))


@pytest.mark.skipif(importlib.util.find_spec("dfloat11") is None, reason="needs the dfloat11 package")
def test_the_packages_kernel_equals_ours(variants: dict[str, Path]) -> None:
    theirs = pipeline(variants["dfloat11"], guidance_batch=True, linears="dfloat11")
    assert "package's kernel" in theirs.model.plan.reasons["linears"]
    assert torch.equal(drawn(theirs), drawn(pipeline(variants["dfloat11"], guidance_batch=True)))


def test_streaming_goes_on_where_pinning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = drawn(pipeline(CHECKPOINT, guidance_batch=True))
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", "pinning")
    pipe = pipeline(CHECKPOINT, guidance_batch=True, residency=Residency(UNITS, 3, "pinned", ("vit", "vae", "lm_head")))
    assert {"pinning", "staging"} <= set(pipe.model.plan.reasons)
    assert torch.equal(drawn(pipe), wanted)


def test_a_refusal_of_cuda_to_pin_is_forgotten() -> None:
    """Registering the same pages twice is refused; nothing after it may see the error."""
    held = pinned_buffer(1 << 20, torch.device("cuda", 0))
    error = torch.cuda.cudart().cudaHostRegister(held.data_ptr(), 1 << 20, 0)
    assert int(error) != 0
    _forget_last_error(torch.device("cuda", 0))
    assert torch.ones(3, device="cuda").sum().item() == 3


def test_dfloat11_equals_its_source(variants: dict[str, Path]) -> None:
    compressed, source = (pipeline(variants[name], guidance_batch=True) for name in ("dfloat11", "source"))
    assert "at use" in compressed.model.plan.reasons["linears"], compressed.model.plan.reasons
    assert torch.equal(drawn(compressed), drawn(source))


@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_native_kernels_agree_with_the_cpu(variants: dict[str, Path], format: str) -> None:
    found = drawn(pipeline(variants[format]))
    on_cpu = BagelPipeline.from_pretrained(variants[format], device="cpu", dtype="float32")
    wanted = drawn(on_cpu)
    assert relative_l2(found, wanted) < 0.06


@pytest.mark.parametrize("source", ["pinned", "pageable", "disk"])
def test_demotion_keeps_the_picture(source: str) -> None:
    """Made in inference mode, as inside a request; the worker that then fills the slots has its own."""
    pipe = pipeline(CHECKPOINT, guidance_batch=True, residency=Residency(UNITS[:1], 2, source))
    before = drawn(pipe)
    while len(pipe.model.residency.streamed) < len(UNITS):
        with torch.inference_mode():
            assert pipe.model.lower_residency(1) >= 0
        assert torch.equal(drawn(pipe), before)


def test_memory_returns_after_many_requests() -> None:
    pipe = pipeline(CHECKPOINT)
    drawn(pipe)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for seed in range(50):
        pipe.generate("a red circle", **DRAWING | {"seed": seed, "num_timesteps": 2})
    gc.collect()
    assert torch.cuda.memory_allocated() == before
    pipe.close()
    del pipe
    gc.collect()
    assert torch.cuda.memory_allocated() < before


def test_cancelled_request_leaves_the_pipeline_usable() -> None:
    pipe = pipeline(CHECKPOINT, guidance_batch=True, residency=Residency(UNITS, 2, "pinned"))
    wanted = drawn(pipe)
    with pytest.raises(Cancelled):
        pipe.generate("a red circle", callback=lambda _: False, **DRAWING)
    assert torch.equal(drawn(pipe), wanted)


def test_read_error_is_reported_and_the_pipeline_recovers() -> None:
    pipe = pipeline(CHECKPOINT, guidance_batch=True, residency=Residency(UNITS, 2, "pageable"))
    wanted = drawn(pipe)
    source = pipe.model.bagel.decoder.source.source
    read = source._read

    class Failing:
        nbytes = read.nbytes

        def __call__(self, *arguments: object) -> None:
            raise CheckpointError("the disk went away")

    source._read = Failing()
    with pytest.raises(CheckpointError, match="disk"):
        drawn(pipe)
    source._read = read
    assert torch.equal(drawn(pipe), wanted)


def test_two_pipelines_in_one_process(variants: dict[str, Path]) -> None:
    first, second = pipeline(CHECKPOINT), pipeline(variants["dfloat11"])
    a, b = drawn(first), drawn(second)
    assert torch.equal(a, drawn(first))
    assert torch.equal(b, drawn(second))
