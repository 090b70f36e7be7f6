"""The MLP of routed experts against an implementation of its own, token by token in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.numeric import relative_l2
from torch import Tensor

from lowmem_bagel.checkpoint.config import BAGEL_7B, BagelConfig, DecoderConfig, Routed
from lowmem_bagel.model.decoder import ExpertLayer
from lowmem_bagel.ops.linear import DenseLinear, Linear, RMSNorm
from lowmem_bagel.ops.routed import add_slots, route

HIDDEN, SIZE = 48, 24


def layer_of(count: int, active: int) -> ExpertLayer:
    """Random weights; a router whose logits are of the size of one."""
    decoder = DecoderConfig(HIDDEN, 2, 4, 2, count * SIZE, 64, 1e6, 1e-6, Routed(count, active, SIZE, frozenset((1,))))
    config: BagelConfig = replace(BAGEL_7B, decoder=decoder)

    def linear(layer: int, expert: str, name: str, in_features: int, out_features: int) -> Linear:
        return DenseLinear(in_features, out_features, name == "qkv", torch.float32)

    layer = ExpertLayer(config, 1, "gen", linear, torch.float32)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
    return layer


def expected(layer: ExpertLayer, hidden: Tensor, active: int, count: int) -> Tensor:
    """hidden [tokens, HIDDEN] and what its experts add, each token by itself."""
    weights = layer.gate_up.get_parameter("weight").double().view(count, 2, SIZE, HIDDEN)
    down = layer.down.get_parameter("weight").double().view(count, HIDDEN, SIZE)
    found = []
    for token in hidden.double():
        x = token * (token.square().mean() + layer.eps).rsqrt() * layer.post_norm.double()
        logits = layer.router.double() @ x
        best = sorted(range(count), key=lambda e: -float(logits[e]))[:active]
        for e in best:
            gate, up = weights[e, 0] @ x, weights[e, 1] @ x
            token = token + (1 + logits[e]) * (down[e] @ (gate * torch.sigmoid(gate) * up))
        found.append(token)
    return torch.stack(found)


@pytest.mark.parametrize(("count", "active"), [(16, 8), (4, 1), (5, 5), (1, 1)])
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_router_and_experts_in_float32(count: int, active: int, tokens: int) -> None:
    torch.manual_seed(count + tokens)
    layer, hidden = layer_of(count, active), torch.randn(tokens, HIDDEN)
    norm = RMSNorm(layer.post_norm, layer.eps)
    found = layer._routed_mlp(hidden.clone(), norm, active)
    want = expected(layer, hidden, active, count)
    assert relative_l2(found - hidden, want - hidden) < 1e-5
    assert torch.equal(layer._routed_mlp(hidden.clone(), norm, active), found)


def test_a_batch_goes_through_as_its_rows_do() -> None:
    layer, hidden = layer_of(8, 3), torch.randn(2, 5, HIDDEN)
    attended = torch.randn(2, 5, 4, HIDDEN // 4)
    together = layer.finish(hidden.clone(), [attended])
    assert together.shape == hidden.shape
    for row in range(2):
        alone = layer.finish(hidden[row : row + 1].clone(), [attended[row : row + 1]])
        assert relative_l2(alone[0], together[row]) < 1e-6


def test_experts_that_no_token_goes_through_cost_nothing() -> None:
    layer, hidden = layer_of(8, 2), torch.randn(4, HIDDEN)
    norm = RMSNorm(layer.post_norm, layer.eps)
    before = layer._routed_mlp(hidden.clone(), norm, 2)
    routes = route(norm(hidden), layer.router, 2)
    idle = [e for e in range(8) if routes.offsets[e] == routes.offsets[e + 1]]
    assert idle, "the seed leaves none out"
    for name, parameter in (("gate_up", layer.gate_up), ("down", layer.down)):
        weight = parameter.get_parameter("weight")
        rows = len(weight) // 8
        for e in idle:
            weight.data[e * rows : (e + 1) * rows] = float("nan")
        assert weight.isnan().any(), name
    assert torch.equal(layer._routed_mlp(hidden.clone(), norm, 2), before)


def test_slots_are_sorted_by_expert_and_then_by_token() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.5, -1.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 0.2, 0.3, 2.0]])
    routes = route(logits, torch.eye(4), 2)
    assert routes.offsets.tolist() == [0, 1, 3, 5, 6]
    assert routes.tokens.tolist() == [1, 0, 1, 0, 2, 2], "of equal logits the first experts' count"
    assert routes.places.tolist() == [[1, 3], [0, 2], [4, 5]]
    assert torch.allclose(routes.gains, torch.tensor([[1.9, 1.5], [1.0, 1.0], [1.3, 3.0]]))
    slots = torch.arange(6.0)[:, None]
    added = add_slots(torch.full((3, 1), 10.0), slots, routes)
    assert added.flatten().tolist() == pytest.approx([10 + 1.9 + 3 * 1.5, 10 + 0 + 2, 10 + 4 * 1.3 + 5 * 3])
