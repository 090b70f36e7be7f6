"""DBCache on the demo checkpoint: what it would have skipped, in pictures of many scenes at once.

Every layer is computed, and where a scene's cache would have skipped the middle, what it would have predicted is put in
the place of the result: pictures are the cache's, the time is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .extending import extended
from .schedules import Dual

MARKERS = 2
"""Tokens of the picture that are not its latents."""


class Middle:
    """Of one branch, by caches that are alike in layers and order; it watches `forward.run_groups`. A row is a scene of
    a cache's.

    Attributes:
        whole, skipped: evaluations of a scene on average by each cache, through all layers and through some.
    """

    def __init__(self, duals: Sequence[Dual], scenes: int, layers: int, steps: int, tokens: int) -> None:
        self.front, self.order, self.damped = duals[0].front, duals[0].order, duals[0].damped
        self.stop, self.scenes, self.steps, self.tokens = layers - duals[0].back, scenes, steps, tokens
        limits = torch.tensor([(dual.threshold, dual.warm, dual.most) for dual in duals])
        self.threshold, self.warm, self.most = limits.repeat_interleave(scenes, 0).unbind(1)
        self.step, self.in_a_row = 0, torch.zeros(len(self.most))
        self.first: Tensor | None = None
        """What the first layers added when all were last computed."""
        self.known: list[tuple[Tensor, Tensor]] = []
        """Steps at which the middle was computed [rows, 1, 1], and what it added."""
        self.whole, self.skipped = torch.zeros(2, len(duals))

    def begin(self, step: int) -> None:
        """The next pass is of this step."""
        self.step = step

    def __call__(self, layer: int, und: Tensor, gen: Tensor) -> None:
        if layer == 0:
            self._entering = self._latents(gen).clone()
        if layer == self.front:
            self._skips = self._decided(self._latents(gen) - self._entering)
            self._leaving = self._block(und, gen)
        if layer == self.stop:
            self._replace(und, gen)

    def _latents(self, gen: Tensor) -> Tensor:
        return gen.view(len(self.most), -1, gen.shape[-1])[:, -self.tokens :]

    def _markers(self, und: Tensor) -> Tensor:
        return und.view(len(self.most), -1, und.shape[-1])[:, -MARKERS:]

    def _block(self, und: Tensor, gen: Tensor) -> Tensor:
        return torch.cat((self._latents(gen), self._markers(und)), dim=1)

    def _decided(self, residual: Tensor) -> Tensor:
        """Which rows skip the middle: bool [rows]."""
        if self.first is None:
            self.first = residual
        change = ((residual - self.first).abs().mean((1, 2)) / self.first.abs().mean((1, 2))).cpu()
        within = (self.step >= self.warm) & (self.step < self.steps - 1) & (self.in_a_row < self.most)
        skips = within & (change < self.threshold)
        self.in_a_row = torch.where(skips, self.in_a_row + 1, 0)
        share = skips.float().view(-1, self.scenes).mean(1)
        self.skipped, self.whole = self.skipped + share, self.whole + 1 - share
        on_device = skips.to(residual.device)[:, None, None]
        self.first = torch.where(on_device, self.first, residual)
        return on_device

    def _replace(self, und: Tensor, gen: Tensor) -> None:
        added = self._block(und, gen) - self._leaving
        if self.known:
            predicted = extended(self.known, float(self.step), self.order, self.damped)
            block = torch.where(self._skips, self._leaving + predicted, self._leaving + added)
            self._latents(gen)[:] = block[:, : self.tokens]
            self._markers(und)[:] = block[:, self.tokens :]
        here = torch.full_like(self._skips, self.step, dtype=added.dtype)
        later = [*self.known, (here, added)][-(self.order + 1) :]
        if len(self.known) == len(later):
            later = [
                (torch.where(self._skips, old, at), torch.where(self._skips, known, value))
                for (old, known), (at, value) in zip(self.known, later, strict=True)
            ]
        self.known = later
