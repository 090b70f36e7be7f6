"""Values at some places, extended to another: by the polynomial through them, or by Hermite's polynomials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

Place = TypeVar("Place", float, Tensor)
"""One for all values, or a tensor that is broadcast over them."""


def extended(known: Sequence[tuple[Place, Tensor]], place: float, order: int, damped: float = 0.0) -> Tensor:
    """By the last order + 1 that are known, at `place`. damped: contraction of Hermite's polynomials, 0 for a
    polynomial through the points."""
    nodes = known[-(order + 1) :]
    places = [at for at, _ in nodes]
    weights = hermite(places, place, damped) if damped else lagrange(places, place)
    out = torch.zeros_like(nodes[0][1])
    for weight, (_, value) in zip(weights, nodes, strict=True):
        out += weight * value
    return out


def lagrange(places: Sequence[Place], place: float) -> list[Place | float]:
    """The weight of each place's value in the polynomial through all."""
    weights: list[Place | float] = []
    for at, here in enumerate(places):
        weight: Place | float = 1.0
        for index, other in enumerate(places):
            if index != at:
                weight = weight * ((place - other) / (here - other))
        weights.append(weight)
    return weights


def hermite(places: Sequence[Place], place: float, damped: float) -> list[Place | float]:
    """The weight of each place's value where Taylor's powers are Hermite's polynomials, contracted (HiCache, arXiv
    2508.16984): sum of D(i) H(i) / i!, where D(i) are TaylorSeer's differences."""
    ahead = place - places[-1]
    basis = (1.0, 2 * damped**2 * ahead, damped**2 * (4 * damped**2 * ahead**2 - 2))
    rows: list[list[Place | float]] = [[float(i == at) for i in range(len(places))] for at in range(len(places))]
    weights = rows[-1]
    for order in range(1, len(places)):
        rows = [
            [(b - a) / (later - earlier) for a, b in zip(before, after, strict=True)]
            for before, after, earlier, later in zip(rows, rows[1:], places[order - 1 :], places[order:], strict=False)
        ]
        factor = basis[order] / math.factorial(order)
        weights = [weight + factor * part for weight, part in zip(weights, rows[-1], strict=True)]
    return weights
