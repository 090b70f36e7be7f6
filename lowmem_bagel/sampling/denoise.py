"""The denoising loop: guided velocities from the branches' contexts, and Euler steps from noise to latent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.bagel import Bagel
from ..model.decoder import Part, Pass
from ..model.kv_cache import PictureAttention, SequenceView
from ..ops.attention.base import AttentionBackend
from ..ops.rope import Rope
from .guidance import Guidance
from .schedule import timesteps
from .step_caches.base import BranchCache, Predicted

if TYPE_CHECKING:
    from PIL import Image


class Preview:
    """A small picture on its way from the device.

    Steps are launched ahead of the device. Who waits for one of them lets the device run dry, and it waits for the next
    ones to be launched. So ask `ready` at later steps before taking the `image`.
    """

    def __init__(self, latent: Tensor, show: Callable[[Tensor], Image.Image]) -> None:
        self._show, self._copied = show, None
        self._latent = latent
        if latent.is_cuda:
            self._latent = torch.empty(latent.shape, dtype=latent.dtype, pin_memory=True)
            self._latent.copy_(latent, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(latent.device))

    @property
    def ready(self) -> bool:
        """Whether nobody has to wait for it."""
        return self._copied is None or self._copied.query()

    def image(self) -> Image.Image:
        """An eighth of the picture's size, 128x128 pixels for 1024x1024; waits until it is ready."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._show(self._latent)


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
    show: Callable[[Tensor], Image.Image] = field(repr=False)
    """Makes a small picture of a latent in RAM, float32 [tokens, latent_values]."""

    def preview(self) -> Preview:
        """The picture as it is now expected to become.

        A straight step from here to t = 0 and approximate colors, without the autoencoder: computed only when asked
        for, and the picture comes out the same. To be called inside the callback; the first image of a loaded model
        also fits the colors, in some ten milliseconds.
        """
        return Preview(self.x_t - self.t * self.velocity, self.show)


@dataclass(frozen=True)
class Branches:
    """What the guidance branches see; `image` is None where image guidance is off."""

    full: SequenceView
    text: SequenceView
    image: SequenceView | None


class PictureSampler:
    """Samples one latent of rows x columns tokens.

    Args:
        markers: ids of the two marker tokens that frame the latent tokens.
        scratch: the cache's range for the picture's keys, rows * columns + 2 tokens.
        make_cache: called once per distinct branch.
        predicts: what those predict.
        batch: whether branches that are evaluated together run as one batch.

    Attributes:
        evaluations, computed: velocities of a branch so far, and those that went through all layers.
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
        make_cache: Callable[[], BranchCache],
        predicts: Predicted,
        batch: bool,
    ) -> None:
        self.bagel, self.backend, self.guidance = bagel, backend, guidance
        self.scratch, self.batch = scratch, batch
        self.rows, self.columns = grid
        self.views: list[SequenceView] = []
        self.full = self._index(branches.full)
        self.text = self._index(branches.text)
        self.image = None if branches.image is None else self._index(branches.image)
        self.caches, self.predicts = [make_cache() for _ in self.views], predicts
        self.markers = bagel.embed_text(torch.tensor(markers))
        positions = torch.tensor([[view.position] for view in self.views])
        self.cos, self.sin = bagel.rope(positions)
        self.evaluations = self.computed = 0

    def _index(self, view: SequenceView) -> int:
        """Branches that hold the same tokens are one."""
        for index, known in enumerate(self.views):
            if known.same_as(view):
                return index
        self.views.append(view)
        return len(self.views) - 1

    def run(
        self, noise: Tensor, count: int, shift: float, on_step: Callable[[Step], None],
        show: Callable[[Tensor], Image.Image],
    ) -> Tensor:  # fmt: skip
        """noise: float32 [tokens, latent_values] -> latent, after count - 1 Euler steps; `show` is for `Step`."""
        schedule = timesteps(count, shift)
        on_device = schedule.to(self.bagel.device).unbind(0)  # copied once: a copy a step would wait for the device
        x = noise.to(self.bagel.device, torch.float32)
        for index, (t, following) in enumerate(pairwise(schedule.tolist())):
            velocity = self.velocity(x, t, on_device[index][None])
            on_step(Step(index, count - 1, t, x, velocity, show))
            x = x - velocity * (t - following)
        return x

    def velocity(self, x: Tensor, t: float, time: Tensor) -> Tensor:
        """The guided velocity at time t, of which `time` is the device's copy [1]: float32 [tokens, latent_values]."""
        if not self.guidance.active(t):
            return self.plain_velocity(x, time)
        wanted = {self.full, self.text} | ({self.image} if self.image is not None else set())
        found = self._velocities(x, time, sorted(wanted))
        image = None if self.image is None else found[self.image]
        return self.guidance.combine(found[self.full], found[self.text], image)

    def plain_velocity(self, x: Tensor, time: Tensor) -> Tensor:
        """The velocity of the full context alone: float32 [tokens, latent_values]."""
        return self._velocities(x, time, [self.full])[self.full]

    def layers(self, x: Tensor, time: Tensor) -> Iterator[Tensor]:
        """Hidden states of the full context's latent tokens after each layer, [tokens, hidden_size] each: good until
        the next one is asked for. Step caches are not told of it."""
        _, run = self._entering(x, time, [self.full])
        for layer in range(len(self.bagel.decoder.layers)):
            yield run.advance(layer + 1)[1][0]

    def _velocities(self, x: Tensor, time: Tensor, wanted: Sequence[int]) -> dict[int, Tensor]:
        answers = {branch: self.caches[branch].predict() for branch in wanted}
        predicted = {branch: answer for branch, answer in answers.items() if answer is not None}
        missing = [branch for branch in wanted if branch not in predicted]
        self.evaluations += len(wanted)
        groups = [missing] if self.batch and missing else [[branch] for branch in missing]
        if self.predicts == "hidden states":
            for group in groups:
                predicted |= self._forward(x, time, group)
            return {branch: self._velocity(predicted[branch]) for branch in wanted}
        for group in groups:
            predicted |= {branch: self._velocity(h) for branch, h in self._forward(x, time, group).items()}
        for branch in missing:
            self.caches[branch].store(predicted[branch])
        return predicted

    def _velocity(self, hidden: Tensor) -> Tensor:
        return self.bagel.velocity(hidden[None])[0]

    def _forward(self, x: Tensor, time: Tensor, group: Sequence[int]) -> dict[int, Tensor]:
        """Hidden states of the latent tokens before the final norm, [tokens, hidden_size] for each branch."""
        latents, run = self._entering(x, time, group)
        leaving = run.advance(1)[1].unbind(0)
        answers = {b: self.caches[b].after_first_layer(latents, h) for b, h in zip(group, leaving, strict=True)}
        del latents, leaving  # kept through the layers they would only take memory
        found = {branch: answer for branch, answer in answers.items() if answer is not None}
        rest = [branch for branch in group if branch not in found]
        if not rest:
            return found
        if found:
            run.keep([group.index(branch) for branch in rest], self._attention(rest))
        for branch, computed in zip(rest, run.advance(len(self.bagel.decoder.layers))[1].unbind(0), strict=True):
            if self.predicts == "hidden states":
                self.caches[branch].store(computed)
            found[branch] = computed
        self.computed += len(rest)
        return found

    def _entering(self, x: Tensor, time: Tensor, group: Sequence[int]) -> tuple[Tensor, Pass]:
        """The latent tokens as they enter the layers, [tokens, hidden_size], and the pass of their branches."""
        bagel, size = self.bagel, len(group)
        latents = bagel.embed_latents(x, time, self.rows, self.columns)
        rope = self._rope(group)
        parts = [Part("und", self.markers.expand(size, -1, -1), rope), Part("gen", latents.expand(size, -1, -1), rope)]
        return latents, Pass(bagel.decoder, parts, self._attention(group))

    def _rope(self, group: Sequence[int]) -> Rope:
        """Of each branch's picture: cos and sin [len(group), 1, 1, head_dim]."""
        cos, sin = (torch.cat([table[branch : branch + 1] for branch in group]) for table in (self.cos, self.sin))
        return cos, sin

    def _attention(self, group: Sequence[int]) -> PictureAttention:
        return PictureAttention([self.views[branch] for branch in group], self.scratch, self.backend)
