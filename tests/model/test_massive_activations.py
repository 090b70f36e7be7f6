"""Outlier channels of 1e3 to 1e6 in fp16 arithmetic: every linear and the whole stack stay right.

A few channels of Qwen2.5's hidden states and MLP products are thousands of times larger than the rest. Such channels
are injected here at the widths of the 7B shape, and the results compared with the same weights in float32; the same
inputs in plain fp16 overflow, which shows that the tests can fail. Weights are random: N(0, 0.02) at the 7B widths.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.linears import linear
from support.numeric import relative_l2
from torch import Tensor

from lowmem_bagel.checkpoint.config import BagelConfig
from lowmem_bagel.checkpoint.tensors import EXPERTS, Expert
from lowmem_bagel.formats.scaled_matmul import FLOAT16_RESULT, UPCAST, Fp16Weights, choose_matmul
from lowmem_bagel.kernels import nvrtc
from lowmem_bagel.kernels.cuda_source import CudaSource
from lowmem_bagel.kernels.trials import choose_elementwise
from lowmem_bagel.model.decoder import Decoder, Part
from lowmem_bagel.ops.attention.base import AttentionBackend, Causal
from lowmem_bagel.ops.attention.select import select_backend
from lowmem_bagel.ops.linear import SWIGLU, Linear, Product, RMSNorm, Weights, rms_norm, swiglu
from lowmem_bagel.ops.rope import rope_at
from lowmem_bagel.planner.facts import BAGEL_7B

on_cpu = pytest.mark.usefixtures("poisoned")

LIMIT = 5e-3
"""Relative L2 distance from float32."""
SIZES = [1e3, 1e4, 1e5, 1e6]
OVERFLOWS = 65504
OUTLIERS = 3
HIDDEN, WIDE, QKV = 3584, 18944, 4608
WAYS = [Fp16Weights(UPCAST), Fp16Weights(FLOAT16_RESULT)]


def ways_on_card() -> list[Fp16Weights]:
    """By our kernels where they run, and by PyTorch's operations."""
    card = torch.device("cuda")
    steps, why = choose_elementwise(CudaSource(card, torch.float16))
    assert why is None or nvrtc.why_unavailable(card), why
    best = choose_matmul(card)
    return [Fp16Weights(best, steps), Fp16Weights(best), Fp16Weights(FLOAT16_RESULT, steps)]


class Widened(Product):
    """fp16 weights in float32: what is right."""

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        weight, _, bias = weights
        return F.linear(x.float(), weight.float(), bias)


class Plain(Product):
    """fp16 weights as PyTorch multiplies them."""

    def multiply(self, x: Tensor, weights: Weights) -> Tensor:
        weight, _, bias = weights
        return F.linear(x.half(), weight, None if bias is None else bias.half())


def fp16_weights(inputs: int, outputs: int, biased: bool, std: float, random: torch.Generator) -> Weights:
    """Random ones, with a float32 bias. Drawn in float32, since of halves PyTorch draws one by one; and not all, which
    would take longer than the products: what follows the first rows are these again, each time one place on."""
    weight = torch.empty(outputs, inputs, dtype=torch.float16, device=random.device)
    shape = min(outputs, 1024), inputs
    drawn = torch.randn(shape, device=random.device, generator=random).mul_(std).half()
    for number, rows in enumerate(weight.split(1024)):
        rows.copy_(drawn[: len(rows)].roll(number, 1))
    bias = torch.empty(outputs, device=random.device).normal_(generator=random) if biased else None
    return Weights(weight, None, bias)


@cache
def weights_7b(inputs: int, outputs: int, device: str = "cpu") -> Weights:
    return fp16_weights(inputs, outputs, outputs == QKV, 0.02, torch.Generator(device).manual_seed(inputs + outputs))


def with_outliers(x: Tensor, size: float | Tensor) -> Tensor:
    """Three channels, spread over the width, of about `size` in every token ([T, 1]: each token's own)."""
    width = x.shape[-1]
    channels = torch.tensor([3, width // 2, width - 1], device=x.device)
    assert len(channels) == OUTLIERS
    signs = torch.sign(x[..., channels]) + (x[..., channels] == 0)
    x[..., channels] = signs * size * (1 + 0.2 * x[..., channels].abs().clamp(max=1))
    return x


def random_tokens(tokens: int, width: int, device: str = "cpu", seed: int = 1) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(device)


def check(found: Tensor, wanted: Tensor) -> None:
    """Finite and close, as a whole and token by token."""
    assert torch.isfinite(found).all()
    assert relative_l2(found, wanted) < LIMIT
    for one, reference in zip(found.flatten(0, -2), wanted.flatten(0, -2), strict=True):
        assert relative_l2(one, reference) < LIMIT


@cache
def products(inputs: int, outputs: int, repeats: int, device: str) -> tuple[Tensor, Tensor]:
    """Outliers in the input itself, as o and down meet them: tokens of every size side by side; and the right product,
    which plain fp16 has not."""
    weights = weights_7b(inputs, outputs, device)
    sizes = torch.tensor(SIZES * repeats, device=device)[:, None]
    x = with_outliers(random_tokens(len(sizes), inputs, device), sizes)
    fits = torch.isfinite(Plain().product(x, weights)).all(-1)
    assert torch.equal(fits, sizes[:, 0] < OVERFLOWS)
    return x, Widened().product(x, weights)


def check_linear(inputs: int, outputs: int, way: Fp16Weights, repeats: int, device: str) -> None:
    x, wanted = products(inputs, outputs, repeats, device)
    check(way.product(x, weights_7b(inputs, outputs, device)), wanted)


LINEARS = [(HIDDEN, QKV), (HIDDEN, HIDDEN), (HIDDEN, 2 * WIDE), (WIDE, HIDDEN)]


@on_cpu
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.way.name)
@pytest.mark.parametrize(("inputs", "outputs"), LINEARS)
def test_linears_of_the_7b_shape(inputs: int, outputs: int, way: Fp16Weights) -> None:
    check_linear(inputs, outputs, way, 1, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("repeats", [1, 256])
@pytest.mark.parametrize(("inputs", "outputs"), LINEARS)
def test_linears_of_the_7b_shape_on_a_card(inputs: int, outputs: int, repeats: int) -> None:
    for way in ways_on_card():
        check_linear(inputs, outputs, way, repeats, "cuda")


@cache
def behind_swiglu() -> tuple[Tensor, Tensor]:
    """Three tokens of every size, whose gate and up are inside fp16's range and whose product is not; and what is right
    to come out of down, where plain fp16 overflows."""
    weights = weights_7b(WIDE, HIDDEN)
    sizes = torch.tensor(SIZES).repeat_interleave(3)[:, None]
    gate, up = (with_outliers(random_tokens(len(sizes), WIDE, seed=s), sizes.sqrt()).abs() for s in (2, 3))
    gate_up = torch.cat((gate, up), dim=-1)
    product = swiglu(gate_up)
    most = gate_up.amax(-1)
    assert (product.amax(-1) > sizes[:, 0]).all() and (sizes[:, 0] > most / 2).all()
    fits = torch.isfinite(Plain().product(gate_up.half(), weights, SWIGLU)).all(-1)
    assert not fits[sizes[:, 0] > OVERFLOWS].any()
    return gate_up, Widened().product(product, weights)


@on_cpu
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.way.name)
def test_down_behind_massive_products(way: Fp16Weights) -> None:
    gate_up, wanted = behind_swiglu()
    check(way.product(gate_up, weights_7b(WIDE, HIDDEN), SWIGLU), wanted)


@on_cpu
@pytest.mark.parametrize("size", SIZES)
def test_qkv_behind_the_norm_of_a_massive_stream(size: float) -> None:
    """Norm weights as large as the outliers leave what is normalised beyond fp16's range."""
    weights = weights_7b(HIDDEN, QKV)
    x = with_outliers(random_tokens(3, HIDDEN), size)
    norm = with_outliers(1 + 0.1 * random_tokens(1, HIDDEN, seed=4)[0], size**0.9)
    wanted = Widened().product(rms_norm(x, norm, 1e-6), weights)
    for way in WAYS:
        check(way.product(x, weights, RMSNorm(norm, 1e-6)), wanted)
    if size > 10 * OVERFLOWS:
        assert not torch.isfinite(Plain().product(x.half(), weights, RMSNorm(norm.half(), 1e-6))).all()


# --- the stack


@lru_cache(maxsize=1)  # stacks of one shape follow each other
def ordinary_weights(config: BagelConfig, device: str) -> dict[tuple[int, Expert, str], Weights]:
    """Of all layers."""
    d, random = config.decoder, torch.Generator(device).manual_seed(7)
    h, m = d.hidden_size, d.intermediate_size
    return {
        (layer, expert, name): fp16_weights(inputs, outputs, name == "qkv", 1.2 * inputs**-0.5, random)
        for layer in range(d.num_layers)
        for expert in EXPERTS
        for name, inputs, outputs in (
            ("qkv", h, sum(d.qkv_rows)), ("o", h, h), ("gate_up", h, 2 * m), ("down", m, h),
        )
    }  # fmt: skip


class Stack:
    """One set of weights, run in fp16 arithmetic, in float32, and in plain fp16."""

    def __init__(self, config: BagelConfig, size: float, device: str) -> None:
        self.config, self.device = config, torch.device(device)
        self.weights = dict(ordinary_weights(config, device))
        m = config.decoder.intermediate_size
        # Three channels of an MLP whose gate and up are each about the root of the size.
        rows = torch.tensor([3, m // 2, m - 1], device=self.device)
        for expert in EXPERTS:
            name = config.decoder.num_layers // 2, expert, "gate_up"
            weights = self.weights[name]
            massive = weights.weight.clone()
            for row in (*rows, *(rows + m)):
                massive[row] *= size**0.5
            self.weights[name] = weights._replace(weight=massive)

    def decoder(self, product: Product, dtype: torch.dtype) -> Decoder:
        def factory(layer: int, expert: Expert, name: str, inputs: int, outputs: int) -> Linear:
            weights = self.weights[layer, expert, name]
            assert weights.weight.shape == (outputs, inputs)
            return linear(product, *weights)

        with torch.device(self.device):
            decoder = Decoder(self.config, factory, dtype)
        random = torch.Generator().manual_seed(8)
        for path, parameter in decoder.named_parameters():
            if "norm" in path:
                parameter.copy_(1 + 0.1 * torch.randn(parameter.shape, generator=random))
        return decoder.requires_grad_(False)

    def __call__(self, decoder: Decoder, parts: dict[Expert, Tensor], residual: torch.dtype) -> Tensor:
        """Hidden states of all tokens after the last layer, [T, hidden_size] float32."""
        d = self.config.decoder
        position, blocks = 0, []
        for expert, hidden in parts.items():
            at = torch.arange(position, position + hidden.shape[0], device=self.device)[None]
            blocks.append(Part(expert, hidden.to(residual, copy=True)[None], rope_at(at, d.head_dim, d.rope_theta)))
            position += hidden.shape[0]
        mask = Causal()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
            return [attention(self.config, self.device, q.dtype)(q, k, v, mask)]

        return torch.cat(decoder(blocks, attend), dim=1)[0].float()


@cache
def attention(config: BagelConfig, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    d = config.decoder
    name = "chunked" if device.type == "cpu" else "efficient"
    heads = {"num_heads": d.num_heads, "num_kv_heads": d.num_kv_heads, "head_dim": d.head_dim}
    return select_backend(name, device=device, dtype=dtype, **heads).backend


class Massive(NamedTuple):
    """A stack, what goes into it, and what is right to come out, where plain fp16 overflows."""

    stack: Stack
    parts: dict[Expert, Tensor]
    wanted: Tensor


@lru_cache(maxsize=1)  # its tests follow each other
@torch.no_grad()
def massive(config: BagelConfig, size: float, tokens: tuple[tuple[Expert, int], ...], device: str) -> Massive:
    stack = Stack(config, size, device)
    parts = {
        expert: with_outliers(random_tokens(count, config.decoder.hidden_size, device, seed=count), size)
        for expert, count in tokens
    }
    if size > OVERFLOWS:
        plain = stack.decoder(Plain(), torch.float32).half()
        assert not torch.isfinite(stack(plain, parts, torch.float16)).all()
    return Massive(stack, parts, stack(stack.decoder(Widened(), torch.float32), parts, torch.float32))


@torch.no_grad()
def check_stack(config: BagelConfig, way: Fp16Weights, size: float, tokens: dict[Expert, int], device: str) -> None:
    stack, parts, wanted = massive(config, size, tuple(tokens.items()), device)
    found = stack(stack.decoder(way, torch.float16), parts, torch.float32)
    check(found, wanted)
    ordinary = torch.ones(wanted.shape[1], dtype=torch.bool, device=wanted.device)
    ordinary[wanted.abs().amax(0).topk(2 * OUTLIERS).indices] = False
    assert relative_l2(found[:, ordinary], wanted[:, ordinary]) < LIMIT, "beside the outliers"


def of_depth(layers: int, hidden: int = HIDDEN, wide: int = WIDE, heads: int = 28, kv_heads: int = 4) -> BagelConfig:
    d = replace(
        BAGEL_7B.decoder,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=wide,
        num_heads=heads,
        num_kv_heads=kv_heads,
    )
    return replace(BAGEL_7B, decoder=d)


@on_cpu
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.way.name)
@pytest.mark.parametrize("size", SIZES)
def test_all_28_layers_of_a_narrow_stack(way: Fp16Weights, size: float) -> None:
    check_stack(of_depth(28, 256, 512, 4, 2), way, size, {"und": 5, "gen": 7}, "cpu")


@on_cpu
@pytest.mark.parametrize("size", [1e6])
def test_two_layers_of_the_7b_width(size: float) -> None:
    """A sixteenth of the MLP's width, for the sake of memory; the whole of it is above and on a card."""
    check_stack(of_depth(2, wide=WIDE // 16), WAYS[0], size, {"und": 2, "gen": 3}, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_layers_of_the_7b_shape_on_a_card(size: float) -> None:
    for way in ways_on_card():
        check_stack(of_depth(4), way, size, {"und": 34, "gen": 1024}, "cuda")
