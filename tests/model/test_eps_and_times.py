"""Constants of the model that no picture shows: the norms' eps, the frequencies of time, the scale of fp16's values."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.linears import linear
from torch import Tensor, nn

from lowmem_bagel.checkpoint.config import BAGEL_7B, VitConfig
from lowmem_bagel.checkpoint.tensors import Expert
from lowmem_bagel.formats.scaled_matmul import UPCAST, Fp16Weights
from lowmem_bagel.model.bagel import TimeEmbedder
from lowmem_bagel.model.decoder import ExpertLayer
from lowmem_bagel.model.vision import Vit
from lowmem_bagel.ops.attention.full import torch_attention
from lowmem_bagel.ops.linear import Dense, Linear, Weights, rms_norm
from lowmem_bagel.ops.rope import rope_at

SIZES = {"hidden_size": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 96}
CONFIG = replace(BAGEL_7B, decoder=replace(BAGEL_7B.decoder, **SIZES, rms_norm_eps=0.25))


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_every_norm_of_the_vision_tower_has_the_configured_eps(eps: float) -> None:
    """Measured where it decides: on activations that are hardly larger than its root."""
    vit = Vit(VitConfig(32, 2, 4, 48, 14, 56, eps), torch_attention).requires_grad_(False)
    norms = [module for module in vit.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 5
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        x = torch.randn(7, 32) * eps**0.5
        centred = x.double() - x.double().mean(-1, keepdim=True)
        exact = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * norm.weight.double()
        assert torch.allclose(norm(x).double(), exact + norm.bias.double(), rtol=1e-5, atol=1e-6)


def test_the_frequencies_of_time() -> None:
    """At times a thousand times later than the sampler's, which tells 10000 from its neighbours."""
    seen: list[Tensor] = []
    embedder = TimeEmbedder(8)
    embedder.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    times = torch.tensor([0.0, 0.5, 1.0, 1000.0])
    embedder(times)
    frequencies = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = times.double()[:, None] * frequencies
    exact = torch.cat((angles.cos(), angles.sin()), dim=-1)
    assert (seen[0].double() - exact)[:3].abs().max() < 1e-6
    assert (seen[0].double() - exact)[3].abs().max() < 5e-4
    assert math.isclose(frequencies[-1].item(), 1 / 9305.72, rel_tol=1e-5)


def expert_layer(dtype: torch.dtype, large: float) -> ExpertLayer:
    """A layer whose values reach `large`; the same weights for every dtype."""
    random = torch.Generator().manual_seed(3)

    def factory(layer: int, expert: Expert, name: str, inputs: int, outputs: int) -> Linear:
        weight = torch.randn(outputs, inputs, generator=random) * inputs**-0.5
        bias = torch.randn(outputs, generator=random) if name == "qkv" else None
        if bias is not None:
            bias[-32:] *= large  # the values
        if name == "o":
            weight /= large
        if dtype == torch.float16:
            return linear(Fp16Weights(UPCAST), weight.half(), None, bias)
        return linear(Dense(), weight.half().float(), None, bias)

    built = ExpertLayer(CONFIG, 0, "und", factory, dtype).requires_grad_(False)
    for norm in (built.input_norm, built.post_norm, built.q_norm, built.k_norm):
        norm.fill_(1.0)
    return built


@pytest.mark.parametrize("large", [1.0, 1e3, 3e5])
def test_values_beyond_the_range_of_fp16(large: float) -> None:
    """What attention averages may be larger than 65504, and comes back whole."""
    hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4))
    rope = rope_at(torch.arange(5)[None], 16, 1e6)
    finished = []
    for dtype in (torch.float32, torch.float16):
        layer = expert_layer(dtype, large)
        room = layer.room(1, 5, torch.device("cpu"))
        layer.project(hidden.clone(), rope, room)
        values = room[2]
        assert values.dtype == dtype
        assert torch.isfinite(values).all()
        # As attention does it: each token sees the values of all, evenly.
        seen = values.float().mean(1, keepdim=True).expand(-1, 5, -1, -1).repeat_interleave(2, dim=2).to(dtype)
        finished.append(layer.finish(hidden.clone(), [seen]))
    assert torch.allclose(finished[1].float(), finished[0], rtol=2e-2, atol=2e-2)


def test_the_eps_of_the_decoders_norms_is_the_configured_one() -> None:
    layer = expert_layer(torch.float32, 1.0)
    x = torch.randn(1, 3, 64) * 0.1
    weights: Weights = layer.qkv.weights()
    normed = rms_norm(x, layer.input_norm, 0.25)
    assert weights.bias is not None
    assert torch.allclose(layer.raw_qkv(x), normed @ weights.weight.t() + weights.bias, atol=1e-6)
