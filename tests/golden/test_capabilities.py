"""Machines that lack something: each feature switched off, alone and together, and still the right picture.

In float32 every combination must give the reference results; in fp16 arithmetic a picture within stated bounds; and
the plan must say what was chosen and why. On the processor most features are absent anyway, so there the switches are
shown to change nothing but the reasons; on a card the same tests take one way after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import FP32_TOLERANCE, first_step, run_case
from support.live_memory import LiveMemory
from support.numeric import relative_l2
from support.paths import GOLDEN

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.diagnostics.features import feature_names
from lowmem_bagel.errors import SettingError
from lowmem_bagel.hardware.features import VARIABLE
from lowmem_bagel.hardware.profile import Availability, HardwareProfile, as_switched
from lowmem_bagel.kernels.trial_inputs import SMALL, Sizes
from lowmem_bagel.kernels.trials import KERNELS, why_not
from lowmem_bagel.model.vae import MidAttention
from lowmem_bagel.model.vision import Vision
from lowmem_bagel.ops.attention.base import AttentionBackend, AttentionRequest
from lowmem_bagel.ops.attention.chunked import CHUNKED, Chunked
from lowmem_bagel.ops.attention.efficient import Efficient
from lowmem_bagel.ops.attention.math import Plain
from lowmem_bagel.ops.attention.select import try_backend
from lowmem_bagel.planner.estimate import plan_for
from lowmem_bagel.planner.facts import BAGEL_7B, ModelFacts
from lowmem_bagel.planner.plan import Plan, Residency
from lowmem_bagel.planner.solve import Limits, Overrides, Request, make_plan
from lowmem_bagel.runtime.loader import load_model
from lowmem_bagel.runtime.streaming.pinned import PinningRefused, pinned_buffer, staging_buffer
from lowmem_bagel.settings import LoadOptions

GB = 10**9
NAMES = feature_names()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FUSED_ATTENTION = "flash-attn,cudnn,flash,efficient,sdpa"
COMBINATIONS = [
    *NAMES,
    "bf16,flash-attn,cudnn,flash",
    "triton,nvrtc,bitsandbytes,quanto,dfloat11",
    FUSED_ATTENTION,
    f"{FUSED_ATTENTION},math",
    f"{FUSED_ATTENTION},chunked",
    ",".join(name for name in NAMES if name != "chunked"),
    ",".join(name for name in NAMES if name != "math"),
]
FP16_VELOCITY, FP16_LATENT, FP16_LEVELS = 0.005, 0.003, 0.5
"""Relative L2 of the first guided velocity and of the final latent, and the mean difference of the picture's levels in
255. Weights keep their bits; each product's inputs are rounded to 2^-12, and guidance 4 amplifies the differences."""


@pytest.fixture(params=COMBINATIONS)
def off(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """What is switched off in a test."""
    names: str = request.param
    monkeypatch.setenv(VARIABLE, names)
    return tuple(names.split(","))


def check_reasons(pipe: BagelPipeline, off: tuple[str, ...]) -> None:
    """Nothing that is switched off is used, and the plan says so."""
    reasons, attention = pipe.model.plan.reasons, pipe.model.attention
    assert reasons["switched off"] == f"{', '.join(off)}, by {VARIABLE}"
    assert attention.name not in off
    for part in ("vit", "vae"):
        assert reasons[f"{part} attention"].split()[0] not in off
    if pipe.model.plan.device == "cpu" and "sdpa" in off:
        assert "attention sdpa" in reasons
    for name in off:
        assert VARIABLE in reasons.get(f"attention {name}", VARIABLE)
    if pipe.model.plan.device == "cpu":
        assert reasons["text decoding by graph"] == "needs a CUDA GPU, not cpu"
    elif {"float16": {"nvrtc"}, "bfloat16": {"triton", "nvrtc"}, "float32": {"triton"}}[pipe.model.plan.dtype] <= set(
        off
    ):
        assert f"switched off by {VARIABLE}" in reasons["text decoding by graph"]
    if pipe.model.plan.dtype == "float16" and "nvrtc" in off and pipe.model.plan.device != "cpu":
        assert VARIABLE in reasons["elementwise kernels"]


Once = Callable[[BagelPipeline, Any, Callable[[], Any]], Any]


@pytest.fixture(scope="module")
def once() -> Once:
    """`once(pipe, what, make)`: made before by the same parts, or now. On a processor most combinations are left with
    the same ones; on a card each makes its own."""
    known: dict[str, Any] = {}

    def made(pipe: BagelPipeline, what: Any, make: Callable[[], Any]) -> Any:
        plan = pipe.model.plan
        if plan.device != "cpu":
            return make()
        said = [plan.reasons[part].split(";")[0] for part in ("vit attention", "vae attention", "linears")]
        parts = repr((what, pipe.model.attention.name, said, replace(plan, reasons={}, prediction=None)))
        if parts not in known:
            known[parts] = make()
        return known[parts]

    return made


@pytest.mark.parametrize("device", DEVICES)
def test_float32_gives_the_reference(off: tuple[str, ...], device: str, once: Once) -> None:
    pipe = BagelPipeline.from_pretrained(GOLDEN / "checkpoint", device=device, dtype="float32")
    check_reasons(pipe, off)
    once(pipe, "t2i", lambda: run_case(pipe, "t2i")).check_picture_in_float32()
    once(pipe, "ask", lambda: run_case(pipe, "ask")).check_text()


@pytest.mark.parametrize("device", DEVICES)
def test_float32_gives_the_reference_edit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both encoders too, with chunked attention everywhere; only once and for one step, because the picture is large:
    that step sees all that was encoded, and other steps and the decoder are the same for pictures from text."""
    monkeypatch.setenv(VARIABLE, ",".join(name for name in NAMES if name != "chunked"))
    pipe = BagelPipeline.from_pretrained(GOLDEN / "checkpoint", device=device, dtype="float32")
    assert pipe.model.attention.name == "chunked"
    begun = first_step(pipe, "edit")
    first, reference = begun.steps[0], begun.reference
    assert relative_l2(first.x_t, reference["x_t"][0]) < FP32_TOLERANCE
    assert relative_l2(first.velocity, reference["velocities"][0]) < FP32_TOLERANCE


@pytest.mark.parametrize(
    ("device", "off"),
    [
        # On the processor each alone is refused, and said to be, as in float32.
        *(("cpu", off) for off in COMBINATIONS if "," in off),
        *(pytest.param("cuda", off, marks=pytest.mark.gpu) for off in COMBINATIONS),
    ],
    indirect=["off"],
)
def test_fp16_draws_within_bounds(off: tuple[str, ...], device: str, once: Once) -> None:
    pipe = BagelPipeline.from_pretrained(GOLDEN / "checkpoint", device=device, dtype="float16")
    check_reasons(pipe, off)
    assert (pipe.model.plan.residual_dtype, pipe.model.plan.vae_dtype) == ("float32", "float32")
    run = once(pipe, "t2i", lambda: run_case(pipe, "t2i"))
    first, reference = run.steps[0], run.reference
    assert torch.equal(first.x_t.cpu(), reference["x_t"][0])
    error = relative_l2(first.velocity, reference["velocities"][0])
    assert 1e-4 < error < FP16_VELOCITY, "float32 has 2e-6: fp16 was not used"
    assert relative_l2(run.result.latent, reference["latent"]) < FP16_LATENT
    assert run.levels.mean() < FP16_LEVELS


DRAWING = {"height": 64, "width": 96, "seed": 3, "num_timesteps": 5}


@pytest.fixture(scope="module", params=["dfloat11", "int8", "nf4", "fp16"])
def variant(request: pytest.FixtureRequest, variant_of: Callable[[str], Path]) -> tuple[Path, torch.Tensor]:
    """A folder, and the latent that it gives in float32 on the processor."""
    folder = variant_of(request.param)
    latent = BagelPipeline.from_pretrained(folder, device="cpu", dtype="float32").generate("a circle", **DRAWING).latent
    assert latent is not None
    return folder, latent


@pytest.mark.parametrize(
    ("device", "dtype", "off"),
    [
        # On the processor the longest combinations stand for the others; they differ in the attention that is left.
        ("cpu", "float16", COMBINATIONS[-2]),
        ("cpu", "bfloat16", COMBINATIONS[-1]),
        *(
            pytest.param("cuda", dtype, off, marks=pytest.mark.gpu)
            for dtype in ("float16", "bfloat16")
            for off in COMBINATIONS
        ),
    ],
    indirect=["off"],
)
def test_variants_without_abilities(
    variant: tuple[Path, torch.Tensor], dtype: str, device: str, off: tuple[str, ...], once: Once
) -> None:
    """Every format by whatever way is left."""
    folder, wanted = variant
    pipe = BagelPipeline.from_pretrained(folder, device=device, dtype=dtype)
    check_reasons(pipe, off)
    latent = once(pipe, folder, lambda: pipe.generate("a circle", **DRAWING).latent)
    assert latent is not None
    bound = (0.06 if dtype == "bfloat16" else FP16_LATENT) + (0.06 if folder.name == "int8" else 0)
    assert relative_l2(latent, wanted) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["pinned", "pageable"])
def test_streaming_without_pinning(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    units = tuple((layer, expert) for layer in range(3) for expert in ("und", "gen"))
    folder = ModelFolder.open(GOLDEN / "checkpoint")
    plan: Plan = plan_for(folder, LoadOptions(device="cuda", dtype="float32"))
    monkeypatch.setenv(VARIABLE, "pinning")
    pipe = BagelPipeline(load_model(folder, replace(plan, residency=Residency(units, 2, source))))
    assert VARIABLE in pipe.model.plan.reasons["staging"]
    run_case(pipe, "t2i").check_picture_in_float32()


# --- memory of the parts where no fused attention runs


def live_peak(module: torch.nn.Module, *inputs: torch.Tensor) -> int:
    with torch.inference_mode(), LiveMemory() as memory:
        module(*inputs)
    return memory.peak


def vision_peak(attend: AttentionBackend, side: int) -> int:
    """Most bytes alive in one layer of the 7B model's vision tower, for side * side patches."""
    config = replace(BAGEL_7B, vit=replace(BAGEL_7B.vit, num_layers=1))
    with torch.device("meta"):
        vit = Vision(config, 70 * 70, torch.float32, attend).vit
        return live_peak(vit, torch.empty(1, side * side, config.vit.patch_values), torch.empty(side * side).long())


def test_the_vision_tower_does_not_grow_with_the_square_of_its_tokens() -> None:
    """4900 tokens are the most that a picture has; four times as many as 35 * 35."""
    most, few = (vision_peak(Chunked(), side) for side in (70, 35))
    assert most < 4.2 * few
    assert vision_peak(Plain(), 70) > 5 * most, "all scores at once would be seen"
    assert most < 1.3 * vision_peak(Efficient(), 70)


def test_the_autoencoders_attention_does_not_grow_with_the_square_of_its_positions() -> None:
    """A picture of 1024x1024 has 128 * 128 positions, one head of 512 channels."""

    def peak(attend: AttentionBackend, side: int) -> int:
        with torch.device("meta"):
            return live_peak(MidAttention(512, attend), torch.empty(1, 512, side, side))

    assert peak(Chunked(), 128) < 4.5 * peak(Chunked(), 64)
    assert peak(Chunked(), 128) < peak(Plain(), 128)


# --- what the switches do, one by one


def test_without_switches_the_plan_mentions_none() -> None:
    assert "switched off" not in plan_for(ModelFolder.open(GOLDEN / "checkpoint"), LoadOptions(device="cpu")).reasons


def test_a_switch_that_means_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "flash,warp-drive")
    with pytest.raises(SettingError, match="unknown warp-drive; choose from bf16, flash-attn"):
        BagelPipeline.from_pretrained(GOLDEN / "checkpoint", device="cpu")


def test_nothing_left_to_attend_with_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"{FUSED_ATTENTION},chunked,math")
    with pytest.raises(SettingError, match=f"attention cannot run on cpu.*math: switched off by {VARIABLE}"):
        BagelPipeline.from_pretrained(GOLDEN / "checkpoint", device="cpu")


def test_a_forced_backend_that_is_switched_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "chunked")
    with pytest.raises(SettingError, match=f"chunked: switched off by {VARIABLE}"):
        BagelPipeline.from_pretrained(GOLDEN / "checkpoint", device="cpu", attention="chunked")


@pytest.mark.parametrize(("format", "backend"), [("int8", "bitsandbytes"), ("int8", "quanto"), ("nf4", "bitsandbytes")])
def test_a_package_that_is_switched_off_is_refused_by_name(
    format: str, backend: str, variant_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, backend)
    with pytest.raises(SettingError, match=f"{backend} is switched off by {VARIABLE}"):
        BagelPipeline.from_pretrained(variant_of(format), device="cpu", backend=backend)
    pipe = BagelPipeline.from_pretrained(variant_of(format), device="cpu")
    assert pipe.generate("a", seed=0, num_timesteps=2, height=64, width=64).image


def test_without_pinning_copies_go_through_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "pinning")
    with pytest.raises(PinningRefused, match=VARIABLE):
        pinned_buffer(10, torch.device("cpu"))
    buffer, why = staging_buffer(10, torch.device("cpu"))
    assert buffer.numel() == 10
    assert why == f"switched off by {VARIABLE}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_triton_no_kernel_of_ours_is_used(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")
    assert why_not(kernel, torch.device("cpu"), Sizes(SMALL, torch.float32)) == f"switched off by {VARIABLE}"


# --- plans of a modern card with something switched off


MODERN = replace(
    HardwareProfile.hypothetical(24, (8, 9), 64, 25, name="RTX 4090"),
    packages={name: Availability(True, "1") for name in ("triton", "nvrtc", "bitsandbytes", "quanto")},
)


@cache
def facts(format: str) -> ModelFacts:
    return ModelFacts.of_shape(format)


def planned(format: str, names: str, monkeypatch: pytest.MonkeyPatch, max_vram: int | None = None) -> Plan:
    monkeypatch.setenv(VARIABLE, names)
    return make_plan(facts(format), as_switched(MODERN), Limits(max_vram, None, Overrides()), Request())


def test_plan_without_bfloat16_is_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("int8", "bf16", monkeypatch)
    assert (plan.dtype, plan.residual_dtype, plan.vae_dtype) == ("float16", "float32", "float32")
    assert "no native bfloat16" in plan.reasons["dtype"]
    assert planned("int8", "", monkeypatch).dtype == "bfloat16"


def test_plan_takes_the_next_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    order = ["cudnn", "flash", "efficient", "chunked", "math"]
    for format, best_first in (("source", order), ("int8", ["int8", *order])):
        for count in range(len(best_first)):
            assert planned(format, ",".join(best_first[:count]), monkeypatch).attention == best_first[count]
    assert planned("int8", "triton", monkeypatch).attention == "cudnn"


def test_plan_without_triton_runs_int8_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with_triton, without = (planned("int8", names, monkeypatch) for names in ("", "triton"))
    assert with_triton.reasons["linears"] == "Triton kernels on int8 tensor cores"
    assert without.reasons["linears"].startswith("PyTorch's int8 matmul")
    assert with_triton.prediction and without.prediction
    assert with_triton.prediction.seconds < without.prediction.seconds  # type: ignore[operator]


@pytest.mark.parametrize("format", ["source", "int8", "nf4"])
def test_plan_says_what_surrounds_the_matmuls(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said, seconds = {}, {}
    for off in ("", "triton", "triton,nvrtc", "bf16,triton", "bf16,triton,nvrtc"):
        plan = planned(format, off, monkeypatch)
        assert plan.prediction is not None
        said[off], seconds[off] = plan.reasons.get("around the matmuls", "Triton"), plan.prediction.seconds or 0
    assert said[""] == "Triton"
    for bf16 in ("", "bf16,"):
        assert said[f"{bf16}triton"].startswith("CUDA kernels")
        assert said[f"{bf16}triton,nvrtc"].startswith("PyTorch's operations")
        assert seconds[""] < seconds[f"{bf16}triton"] < seconds[f"{bf16}triton,nvrtc"]


def test_plan_without_nvrtc_decodes_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned("dfloat11", "nvrtc", monkeypatch)
    assert plan.linears == "cpu"
    assert f"switched off by {VARIABLE}" in plan.reasons["linears"]
    assert planned("dfloat11", "", monkeypatch).linears == "auto"


def test_plan_without_pinning_streams_through_staging(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, plain = (planned("int8", names, monkeypatch, 8 * GB) for names in ("", "pinning"))
    assert (pinned.residency.source, plain.residency.source) == ("pinned", "pageable")
    assert "plain RAM" in plain.reasons["source"]


def test_plan_with_everything_modern_off(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "bf16,flash-attn,cudnn,flash,triton,nvrtc,bitsandbytes,pinning"
    plan = planned("int8", names, monkeypatch, 8 * GB)
    assert (plan.dtype, plan.attention, plan.residency.source) == ("float16", "efficient", "pageable")
    assert plan.reasons["switched off"] == f"{names.replace(',', ', ')}, by {VARIABLE}"
    json.dumps(plan.to_json())


def test_switches_reach_the_trial_on_the_real_device(monkeypatch: pytest.MonkeyPatch) -> None:
    request = AttentionRequest(torch.device("cpu"), torch.float32)
    assert not isinstance(try_backend(CHUNKED, request), str)
    monkeypatch.setenv(VARIABLE, "chunked")
    assert try_backend(CHUNKED, request) == f"switched off by {VARIABLE}"
