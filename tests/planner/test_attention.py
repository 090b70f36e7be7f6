"""The planner's choice of attention: the declarations that the loader goes by, without a trial."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch

from lowmem_bagel.checkpoint.config import DecoderConfig
from lowmem_bagel.diagnostics.probe import probe
from lowmem_bagel.errors import SettingError
from lowmem_bagel.formats.registry import formats
from lowmem_bagel.hardware.profile import Availability, HardwareProfile
from lowmem_bagel.ops.attention import select
from lowmem_bagel.ops.attention.base import AttentionRequest
from lowmem_bagel.ops.attention.registry import attention_backend, attention_backends, preference
from lowmem_bagel.ops.attention.spec import HALVES
from lowmem_bagel.planner.attention import choose_attention
from lowmem_bagel.planner.compute import Overrides, compute_configs
from lowmem_bagel.planner.facts import BAGEL_7B, ModelFacts

DECODER: DecoderConfig = BAGEL_7B.decoder
CAPABILITIES = [(5, 2), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def card(capability: tuple[int, int]) -> HardwareProfile:
    return HardwareProfile.hypothetical(24, capability, 64, 25)


@pytest.mark.parametrize("lossy", [False, True])
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_planner_and_loader_choose_the_same(
    capability: tuple[int, int], dtype: str, lossy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card where every trial passes; the package that only the loader can find is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(select, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(select, "_trial_error", lambda *_: 0.0)
    loaded = select.select_backend(device="cuda", dtype=getattr(torch, dtype), lossy=lossy, disabled=("flash-attn",))
    planned, why = choose_attention(DECODER, card(capability), "auto", "cuda:0", dtype, lossy)
    assert planned is not None
    assert planned.name == loaded.backend.name
    assert why.startswith("the fastest that this compute capability has")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_lossy_backend_is_taken_unasked_where_weights_are_lossy_and_cudnn_is_not_first(
    capability: tuple[int, int],
) -> None:
    faster = capability >= (8, 0) and capability[0] not in (9, 10)
    for lossy in (False, True):
        spec, why = choose_attention(DECODER, card(capability), "auto", "cuda:0", "bfloat16", lossy)
        assert spec is not None
        assert spec.lossy == (lossy and faster)
        assert ("(int8: lossy, which these weights are not)" in why) == (faster and not lossy)
        assert ("lossy as these weights are" in why) == (faster and lossy)
    assert choose_attention(DECODER, card((8, 9)), "int8", "cuda:0", "bfloat16")[1] == "asked for"


def test_a_plan_counts_with_the_share_of_the_cards_own_kind() -> None:
    spec, wanted = attention_backend("int8"), Overrides(attention="int8")
    shares = [
        next(compute_configs(ModelFacts.of_shape("int8"), card(capability), wanted))[0].attention_cost.share
        for capability in ((8, 9), (9, 0), (12, 0))
    ]
    assert shares[1] == spec.cost.share < attention_backend("cudnn").cost.share < shares[0] == shares[2]
    assert spec.cost.on(None) == spec.cost


def test_weights_that_are_lossy_are_those_of_codes() -> None:
    lossy = {name for name, spec in formats().items() if spec.inexact}
    assert lossy == {"int8", "nf4", *(name for name in formats() if name.startswith("gguf"))}
    for format, backend in (("int8", "int8"), ("bf16", "cudnn"), ("fp16", "cudnn"), ("dfloat11", "cudnn")):
        how, reasons = next(compute_configs(ModelFacts.of_shape(format), card((8, 9)), Overrides()))
        assert how.attention == backend
        assert ("int8: lossy, which these weights are not" in reasons["attention"]) == (backend != "int8")


def test_a_lossy_backend_is_not_planned_for_a_machine_that_lacks_triton() -> None:
    lacking = replace(card((8, 9)), packages={"triton": Availability(False, "not installed")})
    for machine in (lacking, replace(card((8, 9)), switched_off=("int8",))):
        spec, _ = choose_attention(DECODER, machine, "auto", "cuda:0", "bfloat16", lossy=True)
        assert spec is attention_backend("cudnn")
    with pytest.raises(SettingError, match=r"attention int8 cannot run here \(not installed\); choose attention auto"):
        choose_attention(DECODER, lacking, "int8", "cuda:0", "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_choose_the_same_on_this_processor(dtype: str) -> None:
    loaded = select.select_backend(device="cpu", dtype=getattr(torch, dtype))
    for machine in (HardwareProfile.hypothetical(0, None, 64, 0), card((9, 0))):
        planned, _ = choose_attention(DECODER, machine, "auto", "cpu", dtype)
        assert planned is not None
        assert planned.name == loaded.backend.name


@pytest.mark.parametrize("capability", [None, *CAPABILITIES])
def test_what_one_refuses_by_name_the_other_does(
    capability: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = "cpu" if capability is None else "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    machine = HardwareProfile.hypothetical(24, capability, 64, 25)
    for spec in attention_backends().values():
        for dtype in ("float32", *HALVES):
            why = spec.why_not(device, capability, dtype)
            if why is None:
                assert choose_attention(DECODER, machine, spec.name, device, dtype) == (spec, "asked for")
                continue
            assert select.try_backend(spec, AttentionRequest(torch.device(device), getattr(torch, dtype))) == why
            with pytest.raises(SettingError, match=f"attention {spec.name} cannot run here"):
                choose_attention(DECODER, machine, spec.name, device, dtype)


def test_what_was_tried_counts_more_than_what_is_declared() -> None:
    tried = replace(
        card((9, 0)), assumed=False, attention=("efficient", "math"),
        attention_refused={"cudnn": "wrong result", "flash-attn": "not installed"},
    )  # fmt: skip
    spec, why = choose_attention(DECODER, tried, "auto", "cuda:0", "bfloat16")
    assert spec is attention_backend("efficient")
    assert why.endswith("right answers here (cudnn: wrong result; flash-attn: not installed)")
    with pytest.raises(SettingError, match=r"attention cudnn cannot run here \(wrong result\); choose attention auto"):
        choose_attention(DECODER, tried, "cudnn", "cuda:0", "bfloat16")


def test_other_heads_than_those_tried_leave_the_choice_to_the_loader() -> None:
    few = replace(DECODER, num_heads=14)
    assert choose_attention(few, card((9, 0)), "auto", "cuda:0", "bfloat16")[0] is None


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(SettingError, match="unknown attention backend 'fast'; choose auto or one of flash-attn, cudnn"):
        choose_attention(DECODER, card((9, 0)), "fast", "cuda:0", "bfloat16")


def test_the_order_is_that_of_the_rates() -> None:
    """Measured on Hopper; blocks by plain matmuls are counted in another rate."""
    shares = [spec.cost.share for spec in preference((9, 0), lossy=True) if spec.cost.of == "dense"]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", *HALVES])
def test_on_a_real_card_the_plan_names_what_is_loaded(dtype: str) -> None:
    """Tried in the card's own dtype, the choice holds in the others."""
    profile = probe(measure=False)
    planned, _ = choose_attention(DECODER, profile, "auto", "cuda:0", dtype)
    assert planned is not None
    assert planned.name == select.select_backend(device="cuda", dtype=getattr(torch, dtype)).backend.name
