"""The planner's memory model against tensors counted alive, and what it knows of the sampler's steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
from support.kinds import one_of_each_kind
from support.live_memory import LiveMemory
from torch import Tensor

from lowmem_bagel.checkpoint.config import Routed, VaeConfig
from lowmem_bagel.formats.base import DenseLinears, encoded_linear
from lowmem_bagel.formats.dense.elementwise import ElementwiseDense
from lowmem_bagel.formats.int8 import kernels as int8_kernels
from lowmem_bagel.formats.int8.packed import PackedInt8
from lowmem_bagel.formats.int8.scaled import Int8Products
from lowmem_bagel.formats.int8.tiles import Tiles
from lowmem_bagel.formats.registry import format_spec
from lowmem_bagel.formats.scaled_matmul import FLOAT32_RESULT, Fp16Weights
from lowmem_bagel.formats.spec import Around, Environment
from lowmem_bagel.hardware.profile import HardwareProfile
from lowmem_bagel.kernels.cuda_source import CudaSource
from lowmem_bagel.kernels.elementwise_cuda import CudaElementwise
from lowmem_bagel.model.bagel import Bagel
from lowmem_bagel.model.decoder import Decoder, Part
from lowmem_bagel.model.kv_cache import KVCache, Region, SequenceView
from lowmem_bagel.model.vae import Vae
from lowmem_bagel.ops.dtypes import wide
from lowmem_bagel.ops.elementwise import Elementwise
from lowmem_bagel.ops.linear import SWIGLU, Before, Dense, DenseLinear, Linear, Product, Rows, Weights, count_tokens
from lowmem_bagel.ops.rope import qk_norm_rope, rope_at
from lowmem_bagel.ops.routed import Groups
from lowmem_bagel.planner.compute import Overrides, first_way
from lowmem_bagel.planner.facts import BAGEL_7B, ModelFacts
from lowmem_bagel.planner.memory import (
    ComputeConfig,
    Workload,
    hidden_bytes,
    layer_bytes,
    rope_bytes,
    states_bytes,
    vae_decode_bytes,
    vae_encode_bytes,
    velocity_bytes,
)
from lowmem_bagel.planner.solve import Limits, Request, breakdown, make_plan
from lowmem_bagel.planner.workload import guided_steps
from lowmem_bagel.sampling.denoise import Branches, PictureSampler
from lowmem_bagel.sampling.frames import Frames
from lowmem_bagel.sampling.guidance import Guidance
from lowmem_bagel.sampling.schedule import timesteps
from lowmem_bagel.sampling.step_caches import taylorseer
from lowmem_bagel.sampling.step_caches.base import StepCache
from lowmem_bagel.sampling.step_caches.none import NONE
from lowmem_bagel.sampling.step_caches.registry import step_caches

CACHES = one_of_each_kind()
EVALUATIONS = {"none": 2, "taylorseer": 11, "first-block": 4}
"""After so many a cache has held the most that it ever does, others after nine. Without one each is like the first."""
SIDE = 16
"""Latent tokens a side of the picture that is drawn without memory."""


@pytest.mark.parametrize("interval", [(0.4, 1.0), (0.0, 1.0), (0.9, 0.95)])
@pytest.mark.parametrize(("count", "shift"), [(50, 3.0), (20, 1.0), (2, 4.0)])
def test_guided_steps_are_those_of_the_sampler(count: int, shift: float, interval: tuple[float, float]) -> None:
    guidance = Guidance(4.0, 1.0, interval, "global", 0.0)
    sampled = sum(guidance.active(t) for t in timesteps(count, shift).tolist()[:-1])
    assert guided_steps(count, shift, interval) == sampled
    assert guided_steps(50, 3.0, (0.4, 1.0)) == 41


class NoModule:
    """Kernels that do nothing and keep nothing."""

    def kernel(self, name: str, shared_bytes: int = 0) -> Callable[..., None]:
        return lambda *_: None


def product_of(form: str, dtype: torch.dtype, around: Elementwise | None) -> tuple[DenseLinears, Product]:
    """What multiplies by a format's weights, and how linears are built for it."""
    if dtype == torch.float16:
        dense: Product = Fp16Weights(FLOAT32_RESULT, around)
    else:
        dense = Dense() if around is None else ElementwiseDense(around)
    linears = DenseLinears(dtype, dense)
    if form == "source":
        return linears, dense
    assert around is not None
    return linears, Int8Products(around, PackedInt8(around.half))


def live_layer(
    dtype: torch.dtype, branches: int, tokens: int, form: str, stepped: bool, own: Product | None = None
) -> int:
    """Most bytes alive in two decoder layers of the 7B shape, attention aside. own: multiplies instead."""
    source = CudaSource(torch.device("meta"), dtype, load=lambda *_, **__: NoModule())
    around = CudaElementwise(source) if stepped else None
    dense, product = product_of(form, dtype, around)
    product = own or product
    config = replace(BAGEL_7B, decoder=replace(BAGEL_7B.decoder, num_layers=2))
    with torch.device("meta"), torch.inference_mode():

        def linear(layer: int, expert: str, name: str, inputs: int, outputs: int) -> Linear:
            if form == "source":
                return dense.build([], inputs, outputs, name == "qkv")
            return encoded_linear(format_spec(form), inputs, outputs, product, wide(dtype) if name == "qkv" else None)

        rotate = qk_norm_rope if around is None else around.rotate
        decoder = Decoder(config, linear, dtype, rotate=rotate)
        rope = rope_at(torch.zeros(branches, 1, dtype=torch.long), 128, 1e6)
        parts = [
            Part("und", torch.empty(branches, 2, 3584, dtype=wide(dtype)), rope),
            Part("gen", torch.empty(branches, tokens, 3584, dtype=wide(dtype)), rope),
        ]
        with LiveMemory() as memory:
            decoder(parts, lambda layer, q, k, v: [q.clone()])
    return memory.peak


def compute(form: str, dtype: str, around: Around) -> ComputeConfig:
    """What the planner computes with on a card without Triton, or by PyTorch's operations."""
    missing = {"triton": "not here"} | ({"nvrtc": "not here"} if around == "torch" else {})
    here = Environment("cuda", dtype, (9, 0), missing)
    assert here.around == around or dtype == "float32"
    way, _ = first_way(format_spec(form).ways, here, Overrides())
    return ComputeConfig("cuda", dtype, "float32" if dtype == "float16" else dtype, "float32", "flash", way, around)


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "form", "around"),
    [
        ("bfloat16", "source", "torch"),
        ("float32", "source", "torch"),
        ("float16", "source", "torch"),
        ("bfloat16", "source", "cuda"),
        ("float16", "source", "cuda"),
        ("bfloat16", "int8", "cuda"),
        ("float16", "int8", "cuda"),
    ],
)
def test_activations_of_a_layer_are_those_alive(dtype: str, form: str, around: Around, branches: int) -> None:
    tokens = 1024
    live = live_layer(getattr(torch, dtype), branches, tokens, form, around == "cuda")
    predicted = layer_bytes(BAGEL_7B, compute(form, dtype, around), tokens + 2, tokens + 2, branches)
    assert predicted == pytest.approx(live, rel=0.01)


@pytest.mark.parametrize("branches", [1, 2])
def test_activations_of_int8_in_fp16_on_a_card_with_triton(branches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels take and give float32 there, and add to the residual stream where it lies."""

    def quantized(x: Rows, before: Before) -> tuple[Tensor, Tensor]:
        tokens, width = count_tokens(x), (x if isinstance(x, Tensor) else x[0]).shape[-1]
        values = torch.empty(tokens, width // (2 if before is SWIGLU else 1), dtype=torch.int8)
        return values, torch.empty(tokens)

    def multiplied(values: Tensor, *operands: Any) -> Tensor:
        weight, dtype, residual = operands[1], operands[4], operands[7]
        return torch.empty(len(values), len(weight), dtype=dtype) if residual is None else residual

    monkeypatch.setattr(int8_kernels.fused, "quantized", quantized)
    monkeypatch.setattr(int8_kernels, "int8_matmul", multiplied)
    product = int8_kernels.TritonInt8(Tiles.of(torch.device("cpu")))
    here = Environment("cuda", "float16", (9, 0))
    way, _ = first_way(format_spec("int8").ways, here, Overrides())
    how = ComputeConfig("cuda", "float16", "float32", "float32", "flash", way, here.around)
    assert way.by_triton
    live = live_layer(torch.float16, branches, 1024, "int8", True, product)
    assert layer_bytes(BAGEL_7B, how, 1026, 1026, branches) == pytest.approx(live, rel=0.01)


class AllGroupsAtOnce(Dense):
    """As kernels of routed experts multiply: one result for all of them."""

    def grouped(self, x: Tensor, weights: Weights, groups: Groups, before: Before = None) -> Tensor:
        rows = self.prepared(x, before)
        return rows.new_empty(groups.slots(x), len(weights.weight) // groups.parts)


def test_activations_of_routed_experts_are_those_alive() -> None:
    """So many of them active that the whole MLP, of which the first and the last layer are, would take less."""
    routed = Routed(16, 14, 1184, frozenset((0, 1)))
    config = replace(BAGEL_7B, decoder=replace(BAGEL_7B.decoder, num_layers=2, routed=routed))
    linears, tokens = DenseLinears(torch.bfloat16, AllGroupsAtOnce()), 1024
    with torch.device("meta"), torch.inference_mode():
        decoder = Decoder(
            config,
            lambda layer, expert, name, inputs, outputs: linears.build([], inputs, outputs, name == "qkv"),
            torch.bfloat16,
        )
        rope = rope_at(torch.zeros(1, 1, dtype=torch.long), 128, 1e6)
        part = Part("gen", torch.empty(1, tokens, 3584, dtype=torch.bfloat16), rope)
        with LiveMemory() as memory:
            decoder([part], lambda layer, q, k, v: [q.clone()])
    how = compute("source", "bfloat16", "torch")
    whole, predicted = (layer_bytes(model, how, tokens, tokens) for model in (BAGEL_7B, config))
    assert predicted > 1.2 * whole
    assert predicted == pytest.approx(memory.peak, rel=0.01)


def test_a_plan_counts_active_experts_for_time_and_all_for_memory() -> None:
    """The published shape: as much to hold, and fewer multiplications in gen."""
    dense, sparse = (ModelFacts.of_shape("int8", shape) for shape in ("bagel-7b", "bagel-moe-7b"))
    held = [facts.units[1, "gen"].nbytes(2) for facts in (dense, sparse)]
    assert held[1] == pytest.approx(held[0], rel=2e-3)
    assert dense.units[1, "und"] == sparse.units[1, "und"]
    assert dense.units[0, "gen"] == sparse.units[0, "gen"]
    card = HardwareProfile.hypothetical(24, (8, 9), 64, 25, name="RTX 4090")
    plans = (make_plan(facts, card, Limits(), Request(tasks=("generate",))) for facts in (dense, sparse))
    seconds = [plan.prediction.seconds for plan in plans if plan.prediction is not None]
    assert None not in seconds
    assert 1.1 < seconds[0] / seconds[1] < 1.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_of_the_vae_are_those_alive(dtype: torch.dtype) -> None:
    with torch.device("meta"), torch.inference_mode():
        vae = Vae(VaeConfig()).to(dtype)
        latent = torch.empty(1, 16, 128, 128, dtype=dtype)
        with LiveMemory() as decoding:
            vae.decode(latent)
        with LiveMemory() as encoding:
            vae.encode(torch.empty(1, 3, 1024, 1024, dtype=dtype), latent)
    assert vae_decode_bytes(VaeConfig(), 128, 128, dtype.itemsize) == pytest.approx(decoding.peak, rel=0.05)
    assert vae_encode_bytes(VaeConfig(), 128, 128, dtype.itemsize) == pytest.approx(encoding.peak, rel=0.05)


@functools.cache
def live_sampling(name: str, branches: int, batch: bool, count: int) -> tuple[list[int], list[int]]:
    """Drawing with three layers of the 7B shape in bfloat16 and the step cache of this name: most bytes alive in each
    step, and those kept after it. Several tests compare the same, and say so in the same words."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return drawn_with(monkeypatch, step_caches()[name], branches, batch, count)


def drawn_with(
    monkeypatch: pytest.MonkeyPatch, cache: StepCache, branches: int, batch: bool, count: int
) -> tuple[list[int], list[int]]:
    config = replace(BAGEL_7B, decoder=replace(BAGEL_7B.decoder, num_layers=3), vit=replace(BAGEL_7B.vit, num_layers=1))
    frames = Frames(SIDE, SIDE, count)
    # The first-block cache asks whether the first layer changed; there are no numbers, so the test answers.
    monkeypatch.setattr(taylorseer, "INTERVAL", 1)  # so that it soon stores all that it ever does
    changes = cycle([1.0] * branches * 2 + [0.0] * branches)
    monkeypatch.setattr(torch.Tensor, "__float__", lambda _: next(changes))
    make_cache = partial(cache.branch, **{setting.name: 0.5 for setting in cache.settings})
    with torch.device("meta"), torch.inference_mode():
        head = DenseLinear(8, 8, bias=False, dtype=torch.bfloat16)
        bagel = Bagel(
            config,
            lambda layer, expert, name, inputs, outputs: DenseLinear(inputs, outputs, name == "qkv", torch.bfloat16),
            head, torch.bfloat16, torch.bfloat16, SIDE * SIDE, 4,
        )  # fmt: skip
        kv_cache = KVCache(config.decoder, 200 + frames.tokens, torch.bfloat16, torch.device("meta"))
        after = 100 + frames.tokens
        regions = Region(0, 100), Region(after, after + 100), Region(after, after + 100)
        texts, full, empty = (SequenceView(kv_cache, region) for region in regions)
        texts.append(50, 50)
        full.append(80, 80)
        guidance = Guidance(4.0, 2.0 if branches > 2 else 1.0, (0.0, 1.0), "text_channel", 0.0)
        with torch.device("cpu"):
            sampler = PictureSampler(
                bagel, lambda q, k, v, mask: q.clone(), Branches(full, empty, texts if branches > 2 else None),
                guidance, (0, 1), range(100, after), frames, make_cache, cache.predicts, batch,
            )  # fmt: skip
        peaks, kept = [], []
        with LiveMemory() as memory:
            x, time = torch.empty(frames.latents, config.latent_values), torch.empty(1)
            for _ in range(EVALUATIONS.get(cache.name, 9)):
                memory.peak = memory.now
                sampler.velocity(x, 0.5, time)
                peaks.append(memory.peak)
                kept.append(memory.now)
    return peaks, kept


@pytest.mark.parametrize("batch", [False, True], ids=["one by one", "batch"])
@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("cache", [cache for cache in CACHES if cache is not NONE], ids=lambda cache: cache.name)
def test_a_step_cache_takes_what_is_alive(cache: StepCache, branches: int, batch: bool) -> None:
    """Beside what drawing takes without it, in hidden states of the picture; exactly, but for small things."""
    how, together = compute("source", "bfloat16", "torch"), branches if batch else 1
    plain, always = live_sampling(NONE.name, branches, batch, 1)
    cached, kept = live_sampling(cache.name, branches, batch, 1)
    workload = Workload("edit", (SIDE, SIDE), [], 0, 80, 0, branches, 49, 49)
    state = hidden_bytes(BAGEL_7B, how, workload)
    stored, live = cache.stored(49), max(cached) - max(plain)
    cached_workload = replace(workload, step_cache=cache, stored_states=stored)
    predicted = states_bytes(BAGEL_7B, how, cached_workload, together) - states_bytes(BAGEL_7B, how, workload, together)
    assert predicted == pytest.approx(live, abs=0.2 * state)
    one = state if cache.predicts == "hidden states" else velocity_bytes(BAGEL_7B, workload)
    assert branches * stored * one == pytest.approx(max(kept) - max(always), abs=0.2 * one)


@pytest.mark.parametrize("batch", [False, True], ids=["one by one", "batch"])
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
@pytest.mark.parametrize("frames", [1, 5])
def test_drawing_takes_what_is_alive(cache: StepCache, batch: bool, frames: int) -> None:
    live = max(live_sampling(cache.name, 2, batch, frames)[0])
    how = compute("source", "bfloat16", "torch")
    workload = Workload("edit", (SIDE, SIDE), [], 0, 80, 0, 2, 49, 49, cache, cache.stored(49), frames=frames)
    together = 2 if batch else 1
    layer = layer_bytes(BAGEL_7B, how, workload.picture_tokens, workload.cached_tokens, together)
    predicted = layer + states_bytes(BAGEL_7B, how, workload, together) + rope_bytes(BAGEL_7B, workload, together)
    assert predicted == pytest.approx(live, rel=0.01)


def test_a_plan_holds_the_step_cache_that_is_asked_for() -> None:
    machine, facts = HardwareProfile.hypothetical(12, (8, 9), 64, 25, name="RTX 3060"), ModelFacts.of_shape("int8")
    requests = [Request(tasks=("generate",), step_cache=name) for name in step_caches()]
    plain, taylorseer, first_block, *velocity = (make_plan(facts, machine, Limits(), request) for request in requests)
    drawing = [
        next(row.activations for row in breakdown(plain, facts, machine, Limits(), request) if row.phase == "denoise")
        for request in requests
    ]
    assert drawing[0] < drawing[2] < drawing[1]
    assert all(drawing[0] < taken < 1.02 * drawing[0] for taken in drawing[3:])
    assert sorted(plan.prediction.seconds for plan in velocity) == [plan.prediction.seconds for plan in velocity[::-1]]
    assert taylorseer.prediction.seconds < 0.6 * plain.prediction.seconds <= 0.6 * first_block.prediction.seconds
    assert "step_cache" not in plain.reasons
    assert "19 of 49 steps are computed" in taylorseer.reasons["step_cache"]
    assert "depends on the picture" in first_block.reasons["step_cache"]
