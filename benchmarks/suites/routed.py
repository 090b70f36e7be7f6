"""`lowmem-bagel bench routed`: BAGEL-MoE's experts on a GPU, each kernel against its reference and timed.

Products stand beside one matmul of as much work, one matmul an expert, PyTorch's grouped one where there is one, and
other tiles. "MLP" is all that a layer does there (norm, router, experts, their sum added to the residual) beside the
whole MLP that the experts were cut of, in the same format and in bf16. Ends with exit code 1 if any kernel is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_bagel.checkpoint.config import BAGEL_7B, Routed
from lowmem_bagel.errors import SettingError
from lowmem_bagel.formats.base import encoded_linear
from lowmem_bagel.formats.dense.triton import TritonDense
from lowmem_bagel.formats.int8 import grouped as int8
from lowmem_bagel.formats.int8.kernels import TritonInt8, int8_matmul
from lowmem_bagel.formats.int8.spec import SPEC as INT8
from lowmem_bagel.formats.int8.tiles import Tiles
from lowmem_bagel.formats.nf4.kernels import TritonNf4
from lowmem_bagel.formats.nf4.spec import SPEC as NF4
from lowmem_bagel.kernels import grouped_matmul as dense
from lowmem_bagel.kernels.elementwise import quantize
from lowmem_bagel.kernels.grouped_matmul import GroupTile
from lowmem_bagel.model.decoder import ExpertLayer
from lowmem_bagel.ops.linear import DenseLinear, Linear, Product
from lowmem_bagel.ops.routed import Groups, Routes, route

from ..cases import Case, Rivals, Run, Setup, run_cases
from ..options import CheckOnly, Out, Seed, Shape, Threads

TOKENS = (4096, 8192)
"""A picture of 1024x1024, and both branches of its guidance."""
OTHER_TILES = (GroupTile(128, 256, 64, 8, 3), GroupTile(128, 128, 64, 4, 4), GroupTile(256, 128, 64, 8, 3))
OTHER_INT8_TILES = (GroupTile(128, 256, 128, 8, 3), GroupTile(128, 128, 128, 8, 3), GroupTile(256, 128, 64, 8, 3))
Form = Literal["bf16", "int8", "nf4"]
FORMS: tuple[Form, ...] = ("bf16", "int8", "nf4")


def routed_command(
    shape: Shape = "bagel-moe-7b",
    threads: Threads = 8,
    seed: Seed = 0,
    check_only: CheckOnly = False,
    out: Out = Path("routed.json"),
) -> None:
    """Time routed experts beside the whole MLP, and write a JSON record."""
    setup = Setup.of(shape, check_only, seed)
    if setup.decoder.routed is None:
        raise SettingError(f"{shape} has no routed experts; use --shape bagel-moe-7b")
    run_cases("routed", setup, PARTS, out, {"shape": shape, "seed": seed}, threads)


def experts_of(on: Setup) -> Routed:
    assert on.decoder.routed is not None
    return on.decoder.routed


def routes_of(on: Setup, tokens: int) -> tuple[Tensor, Routes]:
    """Activations and where a random router sends them, to all experts about equally."""
    x, router = on.random(tokens, on.decoder.hidden_size), on.random(experts_of(on).count, on.decoder.hidden_size)
    return x, route(x, router * 0.02, experts_of(on).active)


def products(on: Setup, tokens: int) -> Iterator[tuple[str, int, Tensor, Groups]]:
    """The two products of a layer: name, columns of a part, activations, groups."""
    experts, (x, routes) = experts_of(on), routes_of(on, tokens)
    yield "gate_up", 2 * experts.size, x, routes.scattered
    yield "down", on.decoder.hidden_size, on.random(len(routes.tokens), experts.size), routes.sorted


def dense_cases(on: Setup) -> Iterator[Case]:
    for tokens in on.tokens(*TOKENS):
        for name, n, x, groups in products(on, tokens):
            slots, k = groups.slots(x), x.shape[1]
            weights = on.rotated(on.random, groups.parts * n, k, most=3)
            inputs = [weight.mul_(0.02) for weight in weights]
            yield Case(
                "grouped_matmul", f"{name} {slots} x {n} x {k}", partial(dense.grouped_matmul, x, groups=groups),
                partial(dense.grouped_matmul_reference, x, groups=groups), inputs, 2.0 * slots * n * k, "op/s", 1.0,
                tolerance=1e-2, rivals=dense_rivals(on, x, n, groups, inputs),
            )  # fmt: skip


def dense_rivals(on: Setup, x: Tensor, n: int, groups: Groups, weights: list[Tensor]) -> Rivals:
    rows = x if groups.rows is None else x.index_select(0, groups.rows)
    bounds = list(pairwise(groups.offsets.tolist()))

    def one_by_one(weight: Tensor) -> list[Tensor]:
        return [F.linear(rows[a:b], weight[e * n : (e + 1) * n]) for e, (a, b) in enumerate(bounds)]

    found: dict[str, tuple[Run, list[Tensor]]] = {
        "one matmul of as much work": (lambda weight: F.linear(rows, weight[:n]), weights),
        "a matmul an expert": (one_by_one, weights),
    }
    grouped_mm = getattr(torch, "_grouped_mm", None)
    if grouped_mm is not None and on.capability >= (9, 0) and on.half == torch.bfloat16:
        parts = groups.parts

        def theirs(weight: Tensor) -> Tensor:
            out: Tensor = grouped_mm(rows, weight.view(parts, n, -1).transpose(1, 2), offs=groups.offsets[1:])
            return out

        found["torch._grouped_mm, rows gathered"] = (theirs, weights)
    for tile in OTHER_TILES:
        found[_name(tile)] = (partial(dense.grouped_matmul, x, groups=groups, tile=tile), weights)
    return found


def int8_cases(on: Setup) -> Iterator[Case]:
    tiles = Tiles.of(on.device)
    for tokens in on.tokens(*TOKENS):
        for name, n, x, groups in products(on, tokens):
            slots, k = groups.slots(x), x.shape[1]
            weights, (values, token) = on.rotated(on.integers, groups.parts * n, k, most=6), quantize(x)
            row = on.wide(groups.parts * n).abs() / 127
            many = on.integers(slots, k), on.wide(slots).abs()
            tile = tiles.choose(slots, n, k)

            def run(weight: Tensor, tile: GroupTile | None = None, given: tuple[Tensor, ...] = (values, token, row),
                    groups: Groups = groups) -> Tensor:  # fmt: skip
                return int8.int8_grouped(given[0], given[1], weight, given[2], groups, on.half, tile)

            def whole(weight: Tensor, n: int = n, many: tuple[Tensor, Tensor] = many, tile: object = tile,
                      row: Tensor = row) -> Tensor:  # fmt: skip
                return int8_matmul(*many, weight[:n], row[:n], None, on.half, tile, on.processors)  # type: ignore[arg-type]

            halves = [weight.to(on.half) for weight in weights[:3]]
            rivals: dict[str, tuple[Run, list[Tensor]]] = {
                "one matmul of as much work": (whole, weights),
                "grouped_matmul": (partial(dense.grouped_matmul, x, groups=groups), halves),
            }
            rivals |= {_name(other): (partial(run, tile=other), weights) for other in OTHER_INT8_TILES}
            yield Case(
                "int8_grouped", f"{name} {slots} x {n} x {k}", run,
                partial(_int8_reference, values, token, row, groups, on.half), weights, 2.0 * slots * n * k, "op/s",
                rivals=rivals,
            )  # fmt: skip


def _int8_reference(
    values: Tensor, token: Tensor, row: Tensor, groups: Groups, dtype: torch.dtype, weight: Tensor
) -> Tensor:
    return int8.int8_grouped_reference(values, token, weight, row, groups, dtype)


def _name(tile: GroupTile) -> str:
    return f"tile {tile.m}x{tile.n}x{tile.k}, {tile.warps} warps, {tile.stages} stages"


def mlp_cases(on: Setup) -> Iterator[Case]:
    experts, hidden = experts_of(on), on.decoder.hidden_size
    for form in FORMS:
        run, looped = layer_of(on, form, routed=True), layer_of(on, form, routed=True, groups=False)
        looped.load_state_dict(run.state_dict())
        beside = {f"whole, {form}": layer_of(on, form, routed=False)}
        if form != "bf16":
            beside |= {"routed, bf16": layer_of(on, "bf16", True), "whole, bf16": layer_of(on, "bf16", False)}
        for tokens in on.tokens(*TOKENS):
            inputs = on.rotated(on.random, tokens, hidden, most=8)
            work = 2.0 * tokens * experts.active * 3 * hidden * experts.size
            yield Case(
                f"MLP, {form}", f"{tokens} tokens, {experts.active} of {experts.count} x {experts.size}",
                partial(_through, run), partial(_through, looped), inputs, work, "op/s", 2.0 if form == "int8" else 1.0,
                tolerance=2e-2, rivals={name: (partial(_through, layer), inputs) for name, layer in beside.items()},
            )  # fmt: skip


def _through(layer: ExpertLayer, hidden: Tensor) -> Tensor:
    """What the MLP adds to these hidden states, which are kept."""
    return layer.mlp(hidden.clone())


def layer_of(on: Setup, form: Form, routed: bool, groups: bool = True) -> ExpertLayer:
    """A layer of gen with random weights: one with routed experts, or with the MLP that they were cut of."""
    number = min(experts_of(on).layers)
    decoder = on.decoder if routed else replace(on.decoder, routed=None)
    plain = TritonDense(on.processors if on.capability[0] == 9 else 0, groups)
    encoded: dict[Form, tuple[Product, object]] = {
        "int8": (TritonInt8(Tiles.of(on.device), groups), INT8), "nf4": (TritonNf4(plain), NF4)
    }  # fmt: skip

    def linear(layer: int, expert: str, name: str, in_features: int, out_features: int) -> Linear:
        if form == "bf16" or name in ("qkv", "o"):
            return DenseLinear(in_features, out_features, name == "qkv", on.half, plain)
        product, spec = encoded[form]
        return encoded_linear(spec, in_features, out_features, product)  # type: ignore[arg-type]

    with torch.device(on.device):
        made = ExpertLayer(replace(BAGEL_7B, decoder=decoder), number, "gen", linear, on.half)
    for parameter in made.parameters():
        if parameter.dtype.is_floating_point:
            parameter.data.normal_(0.0, 0.02) if form == "bf16" or parameter.dtype == on.half else parameter.fill_(5e-4)
        else:
            info = torch.iinfo(parameter.dtype)
            parameter.data.random_(max(info.min, -127), info.max + 1)
    made.post_norm.data = torch.ones_like(made.post_norm, dtype=on.half)
    if made.routed is not None:
        made.router.data = made.router.to(on.half)
    return made


PARTS = (dense_cases, int8_cases, mlp_cases)
