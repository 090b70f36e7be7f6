"""What the planner takes a processor to do in a second, and what follows for its predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowmem_bagel.hardware.profile import HardwareProfile
from lowmem_bagel.planner.calibration import MEASURED
from lowmem_bagel.planner.compute import compute_configs
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.latency import TEXT_EXPERTS, LatencyModel, Rates, rates
from lowmem_bagel.planner.solve import Limits, Overrides, Request, make_plan

RAM = 256 << 30
AVX2, AVX512 = ("avx2",), ("avx2", "avx512f")
VNNI = (*AVX512, "avx512_vnni")
AMX = (*VNNI, "avx512_bf16", "amx_int8", "amx_bf16")


def processor(features: tuple[str, ...], cores: int = 4) -> HardwareProfile:
    return HardwareProfile(ram_total=RAM, ram_available=RAM, cpu_features=features, cores=cores)


def rates_of(features: tuple[str, ...], dtype: str, format: str = "source", cores: int = 4) -> Rates:
    machine = processor(features, cores)
    facts = ModelFacts.of_shape(format, "bagel-7b")
    how, _ = next(iter(compute_configs(facts, machine, Overrides(device="cpu", dtype=dtype))))
    return rates(machine, how, MEASURED)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_instructions_are_never_slower(dtype: str) -> None:
    for format in ("source", "int8"):
        found = [rates_of(features, dtype, format).linear for features in ((), AVX2, AVX512, VNNI, AMX)]
        assert found == sorted(found)
        assert found[0] < found[-1]


def test_the_best_of_integers_and_dense_weights_is_expected_of_int8() -> None:
    assert rates_of(AVX2, "float32", "int8").linear == rates_of(AVX2, "float32").linear
    assert rates_of(VNNI, "float32", "int8").linear > rates_of(VNNI, "float32").linear
    # bfloat16 on AMX is faster than integers that are quantised on the way.
    assert rates_of(AMX, "bfloat16", "int8").linear == rates_of(AMX, "bfloat16").linear
    assert rates_of(AMX, "float32", "int8").linear > rates_of(AMX, "float32").linear


def test_bfloat16_that_a_processor_lacks_is_emulated() -> None:
    assert rates_of(AVX512, "bfloat16").linear == rates_of(AVX512, "float32").linear / 2
    assert rates_of(AMX, "bfloat16").linear > rates_of(AMX, "float32").linear


def test_cores_compute_together_and_share_the_memory() -> None:
    one, four, many = (rates_of(AVX512, "float32", cores=cores) for cores in (1, 4, 64))
    assert four.linear == 4 * one.linear
    assert many.linear == 64 * one.linear
    assert one.memory < many.memory == MEASURED.cpu_memory_gbps * 1e9


def test_the_autoencoder_computes_in_float32() -> None:
    assert rates_of(AMX, "bfloat16").convolution == rates_of(AMX, "float32").convolution


def test_the_assumption_names_what_was_assumed() -> None:
    plan = make_plan(
        ModelFacts.of_shape("int8", "bagel-7b"),
        processor(VNNI),
        Limits(overrides=Overrides(dtype="float32")),
        Request(),
    )
    assert plan.reasons["assumptions"] == (
        "4 cores of 300 billion operations a second (avx512_vnni), 24 GB/s of memory: not measured here"
    )
    unknown = make_plan(ModelFacts.of_shape("source", "bagel-7b"), processor(()), Limits(), Request())
    assert "features unknown" in unknown.reasons["assumptions"]


def test_a_token_costs_its_calls_however_small_the_model_is() -> None:
    facts, machine = ModelFacts.of_shape("source", "bagel-7b"), processor(AVX512)
    how, _ = next(iter(compute_configs(facts, machine, Overrides(device="cpu", dtype="float32"))))
    known = rates(machine, how, MEASURED)
    seconds = [
        LatencyModel(facts, how, replace(known, layer_seconds=layer), MEASURED).forward(1, 1, 1, TEXT_EXPERTS)
        for layer in (0.0, known.layer_seconds)
    ]
    layers = facts.config.decoder.num_layers
    assert seconds[1] - seconds[0] == pytest.approx(layers * MEASURED.cpu_layer_seconds)
    assert known.layer_seconds > 0
