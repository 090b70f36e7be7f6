"""Routed experts: which tokens go to which of a layer's small MLPs, and how what those give is added up.

    y = sum over the chosen e of (1 + l_e) * MLP_e(x),   l = x @ R.T, the `active` largest of l chosen

as BAGEL-MoE has it: its router starts at zero, where the sum over all experts is the MLP that was cut. Nothing here
waits for the device, and nothing depends on the order in which it works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Groups(NamedTuple):
    """Rows of activations in groups, each of which has its own part of a weight: what routed experts multiply.

    offsets: int32 [groups + 1], where each group begins and ends. rows: int32 [slots], the row of the activations that
    each place stands for; None where they stand in the groups' order themselves.
    """

    offsets: Tensor
    rows: Tensor | None = None

    @property
    def parts(self) -> int:
        return len(self.offsets) - 1

    def slots(self, x: Tensor) -> int:
        """Rows of all groups together; x: the activations."""
        return len(x) if self.rows is None else len(self.rows)


@dataclass(frozen=True, eq=False)
class Routes:
    """The slots of all tokens, one for each expert that a token goes through, sorted by expert and then by token.

    offsets: int32 [experts + 1], where each expert's slots begin and end. tokens: int32 [slots], whose they are.
    places: int32 [tokens, active], each token's slots, by ascending expert. gains: float32 [tokens, active], what the
    expert's result is multiplied by.
    """

    offsets: Tensor
    tokens: Tensor
    places: Tensor
    gains: Tensor

    @property
    def scattered(self) -> Groups:
        """The groups of activations that stand by token."""
        return Groups(self.offsets, self.tokens)

    @property
    def sorted(self) -> Groups:
        """The groups of activations that stand by slot."""
        return Groups(self.offsets)


def route(x: Tensor, router: Tensor, active: int) -> Routes:
    """x [tokens, in_features], router [experts, in_features] of x's dtype. Of equal logits the first counts."""
    logits = F.linear(x, router)
    tokens, experts = logits.shape
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :active].sort(dim=-1).values
    by_expert, slots = chosen.flatten().sort(stable=True)
    offsets = torch.searchsorted(by_expert, torch.arange(experts + 1, device=x.device)).int()
    places = torch.empty_like(slots).scatter_(0, slots, torch.arange(tokens * active, device=x.device))
    gains = 1 + logits.gather(1, chosen).float()
    return Routes(offsets, (slots // active).int(), places.view(tokens, active).int(), gains)


def add_slots(residual: Tensor, slots: Tensor, routes: Routes) -> Tensor:
    """residual [tokens, width] + each token's slots times their gains, in float32, the lower expert first.

    slots: [slots, width]. The result is of the residual's dtype, whose memory is given up.
    """
    total = residual.float()
    for places, gains in zip(routes.places.unbind(1), routes.gains.unbind(1), strict=True):
        total = total + slots.index_select(0, places).float() * gains[:, None]
    return total.to(residual.dtype)
