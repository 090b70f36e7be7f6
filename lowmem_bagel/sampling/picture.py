"""The denoising loop: guided velocities from the branches' contexts, and Euler steps from noise to latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..attention import AttentionBackend
from ..context import Context, PictureAttention
from ..model.bagel import Bagel
from ..model.decoder import Part
from .guidance import Guidance
from .schedule import timesteps
from .step_cache import StepCache


@dataclass(frozen=True)
class Step:
    """One finished evaluation of the sampler, as a callback sees it.

    `index` counts from 0 to `total` - 1. `x_t` is the latent entering the step and `velocity` the guided velocity,
    both float32 [tokens, latent_values]; copy them to keep them.
    """

    index: int
    total: int
    t: float
    x_t: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class Branches:
    """Contexts of the guidance branches; `image` is None where image guidance is off."""

    full: Context
    text: Context
    image: Context | None


class PictureSampler:
    """Samples one latent of rows x columns tokens.

    Args:
        markers: ids of the two marker tokens that frame the latent tokens.
        scratch: the arena's range for the picture's keys, rows * columns + 2 tokens.
        make_cache: called once per distinct branch.
        batch: whether branches that are evaluated together run as one batch.
    """

    def __init__(
        self,
        bagel: Bagel,
        backend: AttentionBackend,
        branches: Branches,
        guidance: Guidance,
        markers: tuple[int, int],
        scratch: range,
        grid: tuple[int, int],
        make_cache: Callable[[], StepCache],
        batch: bool,
    ) -> None:
        self.bagel, self.backend, self.guidance = bagel, backend, guidance
        self.scratch, self.batch = scratch, batch
        self.rows, self.columns = grid
        self.contexts: list[Context] = []
        self.full = self._index(branches.full)
        self.text = self._index(branches.text)
        self.image = None if branches.image is None else self._index(branches.image)
        self.caches = [make_cache() for _ in self.contexts]
        self.markers = bagel.embed_text(torch.tensor(markers))
        positions = torch.tensor([[c.position] for c in self.contexts])
        self.cos, self.sin = bagel.rope(positions)

    def _index(self, context: Context) -> int:
        """Branches that hold the same tokens are one."""
        for index, known in enumerate(self.contexts):
            if known.same_as(context):
                return index
        self.contexts.append(context)
        return len(self.contexts) - 1

    def run(self, noise: Tensor, count: int, shift: float, on_step: Callable[[Step], None]) -> Tensor:
        """noise: float32 [tokens, latent_values] -> latent, after count - 1 Euler steps."""
        times = timesteps(count, shift).tolist()
        x = noise.to(self.bagel.device, torch.float32)
        for index, (t, following) in enumerate(pairwise(times)):
            velocity = self.velocity(x, t)
            on_step(Step(index, count - 1, t, x, velocity))
            x = x - velocity * (t - following)
        return x

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """The guided velocity at time t: float32 [tokens, latent_values]."""
        if not self.guidance.active(t):
            return self._velocities(x, t, [self.full])[self.full]
        wanted = {self.full, self.text} | ({self.image} if self.image is not None else set())
        found = self._velocities(x, t, sorted(wanted))
        image = None if self.image is None else found[self.image]
        return self.guidance.combine(found[self.full], found[self.text], image)

    def _velocities(self, x: Tensor, t: float, wanted: Sequence[int]) -> dict[int, Tensor]:
        hidden = {branch: self.caches[branch].predict() for branch in wanted}
        missing = [branch for branch, found in hidden.items() if found is None]
        for group in [missing] if self.batch and missing else [[branch] for branch in missing]:
            for branch, computed in zip(group, self._forward(x, t, group), strict=True):
                self.caches[branch].store(computed)
                hidden[branch] = computed
        found = {branch: h for branch, h in hidden.items() if h is not None}
        return {branch: self.bagel.velocity(h[None])[0] for branch, h in found.items()}

    def _forward(self, x: Tensor, t: float, group: Sequence[int]) -> Sequence[Tensor]:
        """Hidden states of the latent tokens before the final norm, [tokens, hidden_size] a branch."""
        bagel, size = self.bagel, len(group)
        latents = bagel.embed_latents(x, torch.tensor([t]), self.rows, self.columns)
        rope = (self.cos[list(group)], self.sin[list(group)])
        parts = [
            Part("und", self.markers.expand(size, -1, -1), rope),
            Part("gen", latents.expand(size, -1, -1), rope),
        ]
        attend = PictureAttention([self.contexts[b] for b in group], self.scratch, self.backend)
        hidden: Tensor = bagel.decoder(parts, attend)[1]
        return hidden.unbind(0)
