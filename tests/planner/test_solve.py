"""The planner: sizes, facts of models, memory against live tensors, promises kept on any machine, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.command import Ran
from support.paths import CHECKPOINT
from torch.utils.flop_counter import FlopCounterMode

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.config import VaeConfig
from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import DoesNotFitError, SettingError
from lowmem_bagel.formats.registry import formats
from lowmem_bagel.hardware.profile import GIB, Availability, HardwareProfile
from lowmem_bagel.model.vae import Vae
from lowmem_bagel.planner.calibration import MEASURED
from lowmem_bagel.planner.estimate import PlanInputs, asked_of, plan_for, plan_inputs, request_for
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.latency import Flops
from lowmem_bagel.planner.plan import Plan
from lowmem_bagel.planner.search import _bits_reversed
from lowmem_bagel.planner.solve import Limits, Overrides, Request, breakdown, make_plan
from lowmem_bagel.settings import TASKS, LoadOptions
from lowmem_bagel.units import format_bytes, parse_bytes, parse_memory

GB = 10**9


@cache
def facts(form: str) -> ModelFacts:
    return ModelFacts.of_shape(form)


def card(vram: float, ram: float, capability: tuple[int, int] = (8, 9), pcie: float = 25.0) -> HardwareProfile:
    return HardwareProfile.hypothetical(vram, capability, ram, pcie, name="RTX 4090" if capability[0] >= 8 else "T4")


@pytest.mark.parametrize(
    ("text", "count"),
    [("8GB", 8 * GB), ("7.5 GiB", 7.5 * GIB), ("500MB", 5 * 10**8), ("12g", 12 * GB), (6e9, 6 * GB), ("", None)],
)
def test_sizes_are_read(text: str | float, count: float | None) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["8 apples", "-3GB", "0", "GB", "nan", "1e400", True, -1, float("nan"), float("inf")])
def test_what_is_no_size_is_refused(text: str | float) -> None:
    with pytest.raises(SettingError, match="max_vram must be a size such as 8GB"):
        parse_bytes(text, "max_vram")


def test_memory_as_sold_counts_in_binary_units() -> None:
    assert [parse_memory(text) for text in ("24GB", "24", "24 GiB", "512MB", "1T")] == [24, 24, 24, 0.5, 1024]
    with pytest.raises(SettingError):
        parse_memory("a lot")


@given(st.integers(1, 10**15))
def test_a_printed_size_is_near_the_count(count: int) -> None:
    assert parse_bytes(format_bytes(max(count, 10**6))) == pytest.approx(max(count, 10**6), rel=0.5)


def test_the_7b_shape_has_the_published_size() -> None:
    source = facts("source")
    assert source.values == pytest.approx(14.69e9, rel=1e-3)
    assert sum(unit.nbytes(2) for unit in source.units.values()) == 26_102_501_376
    assert {f: round(sum(u.nbytes(2) for u in facts(f).units.values()) / 1e9, 1) for f in formats()} == {
        "source": 26.1,
        "bf16": 26.1,
        "dfloat11": 17.7,
        "int8": 13.1,
        "fp16": 26.1,
        "nf4": 7.3,
        "gguf-q8_0": 13.9,
        "gguf-q6_k": 10.7,
        "gguf-q5_k": 9.0,
        "gguf-q4_k": 7.3,
    }


def test_facts_of_a_source_folder_are_its_tensors() -> None:
    folder = ModelFolder.open(CHECKPOINT)
    found = ModelFacts.of_folder(folder)
    stored = sum(torch.Size(s.entry.shape).numel() for s in folder.stored.values())
    assert found.values == stored
    # Position tables aside, whose sizes a configuration does not say, the same follows from the dimensions alone.
    assert found.units == ModelFacts.of_config(folder.config, "source").units
    assert found.latent_side**2 == folder.entry("latent_pos_embed.pos_embed").shape[0]


@pytest.mark.parametrize("form", ["dfloat11", "int8", "nf4"])
def test_facts_of_a_variant_are_its_stored_bytes(variant_of: Callable[[str], Path], form: str) -> None:
    folder = ModelFolder.open(variant_of(form))
    found = ModelFacts.of_folder(folder)
    kept = ("luts", "split_positions")
    unit = found.units[(1, "gen")]
    prefix = "language_model.model.layers.1."
    stored = {n: s for n, s in folder.stored.items() if n.startswith(prefix) and "moe_gen" in n}
    plain = sum(s.entry.nbytes for n, s in stored.items() if s.entry.dtype == "BF16")
    packed = sum(s.entry.nbytes for n, s in stored.items() if s.entry.dtype != "BF16" and n.split(".")[-1] not in kept)
    assert unit.nbytes(2) == plain + packed
    dense = ModelFacts.of_folder(ModelFolder.open(CHECKPOINT))
    assert unit.nbytes(2, decoded=True) == dense.units[(1, "gen")].nbytes(2)
    assert found.values == dense.values
    assert not found.missing


def test_operations_of_the_vae_are_those_counted() -> None:
    with torch.device("meta"), torch.inference_mode():
        vae = Vae(VaeConfig())
        latent = torch.empty(1, 16, 64, 96)
        with FlopCounterMode(display=False) as decoding:
            vae.decode(latent)
        with FlopCounterMode(display=False) as encoding:
            vae.encode(torch.empty(1, 3, 512, 768), latent)
    assert Flops(1, upwards=True)(VaeConfig(), 64 * 96) == pytest.approx(decoding.get_total_flops(), rel=0.05)
    assert Flops(0, upwards=False)(VaeConfig(), 64 * 96) == pytest.approx(encoding.get_total_flops(), rel=0.05)


@given(st.integers(1, 64), st.integers(1, 64))
def test_any_first_few_streamed_layers_lie_evenly(layers: int, first: int) -> None:
    """So that copies hide: no stretch of layers has many more streamed ones than its share."""
    first = min(first, layers)
    chosen = sorted(sorted(range(layers), key=_bits_reversed)[:first])
    gaps = [b - a for a, b in zip(chosen, [*chosen[1:], chosen[0] + layers], strict=True)]
    assert max(gaps) <= 4 * layers / first


profiles = st.builds(
    card,
    vram=st.floats(3, 48),
    ram=st.floats(6, 128),
    capability=st.sampled_from([(7, 0), (7, 5), (8, 0), (8, 9), (9, 0)]),
    pcie=st.floats(3, 60),
)
forms = st.sampled_from([*formats()])
some_tasks = st.sampled_from([TASKS, ("generate",), ("edit",), ("ask",), ("generate", "ask")])
sides = st.sampled_from([256, 512, 768, 1024])


def planned(form: str, profile: HardwareProfile, limits: Limits, request: Request) -> Plan | None:
    try:
        return make_plan(facts(form), profile, limits, request)
    except DoesNotFitError:
        return None


@settings(max_examples=60)
@given(
    forms, profiles, some_tasks, sides, st.one_of(st.none(), st.floats(2, 30)), st.one_of(st.none(), st.floats(2, 60))
)
def test_promises_are_kept_on_any_machine(form, profile, tasks, side, vram, ram) -> None:
    limits = Limits(vram and int(vram * GB), ram and int(ram * GB))
    request = Request(tasks=tasks, height=side, width=side)
    plan = planned(form, profile, limits, request)
    if plan is None:
        return
    assert plan.prediction is not None
    allowed = min(profile.vram_free, limits.max_vram or profile.vram_free)
    assert plan.prediction.peak_bytes < allowed
    rows = breakdown(plan, facts(form), profile, limits, request)
    assert max(row.total for row in rows) == plan.prediction.peak_bytes
    residency, units = plan.residency, facts(form).units
    assert set(residency.streamed) <= set(units)
    assert bool(residency.streamed) == (residency.slots >= 2) == (residency.source != "device")
    assert len(residency.streamed) > residency.slots or not residency.streamed
    streamed = sum(units[unit].nbytes(2) for unit in residency.streamed)
    usable = min(profile.ram_available, limits.max_ram or profile.ram_available) - MEASURED.host_bytes
    if "disk" not in residency.waiting():
        assert streamed <= usable
    if tasks == ("ask",):
        assert plan.experts == ("und",)
        assert all(expert == "und" for _, expert in residency.streamed)
    if profile.native_bf16:
        assert plan.dtype == "bfloat16"
        assert "lossless" not in plan.reasons["exactness"]
    else:
        assert (plan.dtype, plan.residual_dtype, plan.vae_dtype) == ("float16", "float32", "float32")


@settings(max_examples=40)
@given(forms, profiles, some_tasks, st.floats(1, 2), st.floats(1, 2))
def test_more_memory_is_never_slower(form, profile, tasks, more_vram, more_ram) -> None:
    larger = replace(
        profile,
        vram_total=int(profile.vram_total * more_vram),
        vram_free=int(profile.vram_free * more_vram),
        ram_total=int(profile.ram_total * more_ram),
        ram_available=int(profile.ram_available * more_ram),
        pin_limit=int(profile.pin_limit * more_ram),
    )
    request = Request(tasks=tasks)
    before, after = (planned(form, machine, Limits(), request) for machine in (profile, larger))
    if before is None:
        return
    assert after is not None
    assert before.prediction is not None
    assert after.prediction is not None
    assert after.prediction.seconds <= before.prediction.seconds * (1 + 1e-9)


@pytest.mark.parametrize(
    ("machine", "limits", "said"),
    [
        (card(2, 64), Limits(), r"convert to|pictures of|load it for|more memory"),
        (card(24, 64), Limits(max_vram=3 * GB), r"needs (\S+ GB) of GPU memory, .* 3\.00 GB .*; raise max_vram to \1"),
        (HardwareProfile.hypothetical(0, None, 32, 0), Limits(), r"of RAM, and 30\.92 GB may be used; convert to int8"),
        (card(24, 64), Limits(max_ram=GB), r"raise max_ram"),
    ],
)
def test_what_does_not_fit_says_what_would(machine: HardwareProfile, limits: Limits, said: str) -> None:
    with pytest.raises(DoesNotFitError, match=said) as raised:
        make_plan(facts("source"), machine, limits, Request())
    assert "\n" not in str(raised.value)


def test_answers_load_und_alone_and_keep_it() -> None:
    plan = make_plan(facts("source"), card(24, 64), Limits(), Request(tasks=("ask",)))
    assert plan.residency.streamed == ()
    assert plan.prediction.peak_bytes < 18.5 * GB


def test_gen_gives_way_before_und() -> None:
    plan = make_plan(facts("source"), card(16, 64), Limits(), Request())
    kept = {expert: sum(e == expert for _, e in plan.residency.streamed) for expert in ("und", "gen")}
    assert kept["gen"] == 28
    assert 0 < kept["und"] < 28


def test_parts_that_no_task_needs_wait_in_ram() -> None:
    plan = make_plan(facts("source"), card(80, 64), Limits(), Request(tasks=("generate",)))
    assert plan.residency.staged == ("embedding", "lm_head", "vit")
    assert "not needed here" in plan.reasons["vit in RAM"]
    assert make_plan(facts("source"), card(80, 64), Limits(), Request()).residency.staged == ()


def test_branches_run_as_one_batch_where_weights_move_or_are_decoded() -> None:
    eight = Limits(8 * GB)
    streamed = make_plan(facts("source"), card(24, 64), eight, Request(tasks=("generate",)))
    assert streamed.guidance_batch
    assert "copied and decoded once" in streamed.reasons["guidance_batch"]
    assert make_plan(facts("dfloat11"), card(24, 64), Limits(), Request(tasks=("generate",))).guidance_batch


def test_dfloat11_without_its_kernel_is_planned_as_dense() -> None:
    no_kernel = replace(card(24, 64), packages={"nvrtc": Availability(False, "no driver API")})
    plan = make_plan(facts("dfloat11"), no_kernel, Limits(), Request(tasks=("generate",)))
    dense = make_plan(facts("source"), card(24, 64), Limits(), Request(tasks=("generate",)))
    assert plan.linears == "cpu"
    assert "no driver API" in plan.reasons["linears"]
    assert plan.residency.streamed == dense.residency.streamed
    assert make_plan(facts("dfloat11"), card(24, 64), Limits(), Request()).linears == "auto"


def test_a_lossless_variant_never_becomes_lossy_where_it_need_not() -> None:
    for form in ("source", "dfloat11"):
        for vram in (6, 8, 12, 24, 80):
            plan = make_plan(facts(form), card(vram, 64), Limits(), Request(tasks=("generate",)))
            assert plan.dtype == "bfloat16"
            assert plan.reasons["exactness"] == "weights keep the checkpoint's bits"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (Overrides(device="tpu"), "unknown device 'tpu'; use auto, cpu or cuda:0"),
        (Overrides(dtype="int4"), "unknown dtype 'int4'; use auto, float32, bfloat16 or float16"),
        (Overrides(attention="flash"), "attention flash cannot run here"),
    ],
)
def test_impossible_settings_are_refused(overrides: Overrides, message: str) -> None:
    refusing = replace(card(24, 64), attention_refused={"flash": "switched off"})
    with pytest.raises(SettingError, match=message):
        make_plan(facts("source"), refusing, Limits(overrides=overrides), Request())


def test_a_card_that_is_not_there_is_refused() -> None:
    no_card = HardwareProfile.hypothetical(0, None, 64, 0)
    with pytest.raises(SettingError, match="no CUDA device is usable here"):
        make_plan(facts("source"), no_card, Limits(overrides=Overrides(device="cuda")), Request())


def test_settings_made_by_hand_win() -> None:
    overrides = Overrides("cuda:0", "float32", "math", "auto")
    plan = make_plan(facts("source"), card(140, 64), Limits(overrides=overrides), Request(tasks=("ask",)))
    assert (plan.device, plan.dtype, plan.attention) == ("cuda:0", "float32", "math")
    cpu = make_plan(facts("source"), card(24, 128), Limits(overrides=Overrides(device="cpu")), Request(tasks=("ask",)))
    assert (cpu.device, cpu.residency.source) == ("cpu", "device")


def test_float32_on_a_card_takes_an_attention_that_has_it() -> None:
    plan = make_plan(facts("source"), card(140, 64), Limits(overrides=Overrides(dtype="float32")), Request())
    assert plan.attention == "efficient"


def test_a_folder_is_planned_for_this_machine() -> None:
    folder = ModelFolder.open(CHECKPOINT)
    plan = plan_for(folder, LoadOptions(device="cpu"))
    assert (plan.device, plan.dtype, plan.residency.streamed) == ("cpu", "float32", ())
    assert plan.prediction is not None
    with pytest.raises(SettingError, match="tasks must be some of generate, edit, ask"):
        plan_for(folder, LoadOptions(tasks=("paint",)))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="backend 'quanto' cannot run source"):
        plan_for(folder, LoadOptions(backend="quanto"))
    with pytest.raises(SettingError, match="max_vram"):
        plan_for(folder, LoadOptions(max_vram="plenty"))


def test_limits_of_a_folder_are_read_from_its_options() -> None:
    folder = ModelFolder.open(CHECKPOINT)
    limits, request = asked_of(ModelFacts.of_folder(folder), LoadOptions(max_vram="4GB", max_ram=10, dtype="float32"))
    assert limits == Limits(4 * GB, 10, Overrides(dtype="float32"))
    assert request.height <= folder.config.vae_resize.max_side


def test_a_folder_is_planned_for_the_step_cache_and_size_that_are_asked_for(
    cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = BagelPipeline.from_pretrained(CHECKPOINT, device="cpu", step_cache="taylorseer")
    assert "are computed" in pipe.model.plan.reasons["step_cache"]
    with pytest.raises(SettingError, match="unknown step_cache 'fancy'; choose one of none, taylorseer, first-block"):
        BagelPipeline.from_pretrained(CHECKPOINT, step_cache="fancy")
    handed_in = []

    def recorded(folder: ModelFolder, options: LoadOptions) -> PlanInputs:
        inputs = plan_inputs(folder, options)
        handed_in.append((options.step_cache, options.size, (inputs.request.height, inputs.request.width)))
        return inputs

    monkeypatch.setattr("lowmem_bagel.planner.estimate.plan_inputs", recorded)
    for name in ("none", "taylorseer"):
        asked = ("--height", 32, "--width", 48, "--num-timesteps", 3, "--step-cache", name, "--device", "cpu")
        ran = cli("generate", "a circle", "--model", CHECKPOINT, "--out", tmp_path / "out.png", *asked)
        assert ran.code == 0, ran.err
    assert handed_in == [(name, (32, 48), (32, 48)) for name in ("none", "taylorseer")]


def test_a_request_is_no_larger_than_the_model_draws() -> None:
    small = ModelFacts.of_folder(ModelFolder.open(CHECKPOINT))
    request = request_for(small, ("generate",), 4096, 64)
    assert request.height == min(small.config.vae_resize.max_side, small.latent_side * small.config.token_pixels)
    assert request.width == 64


def test_planning_needs_no_torch() -> None:
    modules = "solve, search, facts, calibration, latency, memory"
    code = f"import sys; from lowmem_bagel.planner import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_plans_for_a_card_that_is_not_here(cli: Callable[..., Ran]) -> None:
    done = cli(
        "plan", "--shape", "bagel-7b", "--format", "dfloat11", "--vram", "12GB", "--compute-capability", "8.6",
        "--ram", "32GB", "--pcie", "25", "--card", "RTX 3060", "--step-cache", "taylorseer", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record["machine"] == {"name": "RTX 3060", "here": False, "vram_bytes": 12 * GIB, "ram_bytes": 32 * GIB}
    assert record["plan"]["prediction"]["peak_bytes"] == max(phase["total"] for phase in record["phases"])
    assert record["step_cache"] == "taylorseer" and "step_cache" in record["plan"]["reasons"]
    assert {"device", "dtype", "attention", "memory", "residency", "source", "step_cache"} <= set(
        record["plan"]["reasons"]
    )


def test_the_command_prints_a_table_and_reasons(cli: Callable[..., Ran]) -> None:
    done = cli("plan", CHECKPOINT, "--ram", "16GB", "--task", "generate")
    assert done.code == 0, done.err
    assert "denoise" in done.out
    assert "dtype = float32: the model is small" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a model folder, or --shape"),
        (("--shape", "bagel-7b", "--vram", "8GB"), "--compute-capability must be like 8.9"),
        (("--shape", "bagel-9b", "--ram", "8GB"), "unknown shape"),
        (("--shape", "bagel-7b", "--ram", "8GB", "--size", "large"), "--size must be like 1024"),
        (("--shape", "bagel-7b", "--ram", "8GB"), "source does not fit"),
    ],
)
def test_the_command_says_what_is_wrong(cli: Callable[..., Ran], arguments: tuple[str, ...], message: str) -> None:
    assert message in cli("plan", *arguments).error
