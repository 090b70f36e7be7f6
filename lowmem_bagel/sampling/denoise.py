"""The denoising loop: guided velocities from the branches' contexts, and Euler steps from noise to latent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..model.bagel import Bagel
from ..model.kv_cache import SequenceView
from ..ops.attention.base import AttentionBackend
from .evaluating import Evaluator
from .frames import Frames
from .guidance import Guidance
from .pass_graphs import PassGraphs
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
        """An eighth of the picture's size, 128x128 pixels for 1024x1024; of several frames that are drawn together,
        all on one sheet. Waits until it is ready."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._show(self._latent)


@dataclass(frozen=True)
class Step:
    """One finished evaluation of the sampler, as a callback sees it.

    `index` counts from 0 to `total` - 1. `x_t` is the latent entering the step and `velocity` the guided velocity,
    both float32 [tokens, latent_values], frame after frame; copy them to keep them.
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

    def distinct(self) -> tuple[list[SequenceView], dict[str, int]]:
        """The views that differ, and which of them each branch is by name: those that hold the same tokens are one."""
        views: list[SequenceView] = []
        found: dict[str, int] = {}
        for name, view in (("full", self.full), ("text", self.text), ("image", self.image)):
            if view is not None:
                known = next((index for index, other in enumerate(views) if other.same_as(view)), len(views))
                views += [view] if known == len(views) else []
                found[name] = known
        return views, found


class Elsewhere(Protocol):
    """Branches that another card evaluates while this one evaluates its own.

    Attributes:
        branches: which of the distinct views they are.
        evaluations, computed: as of `Evaluator`; good once the velocities that were begun have been asked for.
    """

    @property
    def branches(self) -> Sequence[int]: ...

    @property
    def evaluations(self) -> int: ...

    @property
    def computed(self) -> int: ...

    def begin(self, x: Tensor, t: float) -> None:
        """Have the velocities of x (float32 [tokens, latent_values]) at time t computed; returns at once."""
        ...

    def velocities(self) -> Mapping[int, Tensor]:
        """What was begun, here: float32 [tokens, latent_values] for each branch, in order of this card's work."""
        ...


class PictureSampler:
    """Samples the latent of a picture, or of several frames in one sequence.

    Args:
        markers: ids of the two marker tokens that frame a frame's latent tokens.
        scratch: the cache's range for the keys of all frames, `frames.tokens`.
        make_cache: called once per distinct branch that is evaluated here.
        predicts: what those predict.
        batch: whether branches that are evaluated together run as one batch.
        elsewhere: who evaluates the others. The full context, which steps without guidance need alone, is not theirs.
        graphs: what replays passes of those here, where any are to be.
    """

    def __init__(
        self,
        bagel: Bagel,
        backend: AttentionBackend,
        branches: Branches,
        guidance: Guidance,
        markers: tuple[int, int],
        scratch: range,
        frames: Frames,
        make_cache: Callable[[], BranchCache],
        predicts: Predicted,
        batch: bool,
        elsewhere: Sequence[Elsewhere] = (),
        graphs: PassGraphs | None = None,
    ) -> None:
        self.bagel, self.guidance, self.elsewhere = bagel, guidance, elsewhere
        self.views, named = branches.distinct()
        self.full, self.text, self.image = named["full"], named["text"], named.get("image")
        there = {branch for other in elsewhere for branch in other.branches}
        assert self.full not in there
        self.here = Evaluator(
            bagel,
            backend,
            {branch: view for branch, view in enumerate(self.views) if branch not in there},
            bagel.embed_text(torch.tensor(markers)),
            scratch,
            frames,
            make_cache,
            predicts,
            batch,
            graphs,
        )

    @property
    def evaluations(self) -> int:
        """Velocities of a branch so far."""
        return self.here.evaluations + sum(other.evaluations for other in self.elsewhere)

    @property
    def computed(self) -> int:
        """Those of them that went through all layers."""
        return self.here.computed + sum(other.computed for other in self.elsewhere)

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
        for other in self.elsewhere:
            other.begin(x, t)
        found = self.here.velocities(x, time, list(self.here.views))
        for other in self.elsewhere:
            found |= other.velocities()
        image = None if self.image is None else found[self.image]
        return self.guidance.combine(found[self.full], found[self.text], image)

    def plain_velocity(self, x: Tensor, time: Tensor) -> Tensor:
        """The velocity of the full context alone: float32 [tokens, latent_values]."""
        return self.here.velocities(x, time, [self.full])[self.full]

    def layers(self, x: Tensor, time: Tensor) -> Iterator[Tensor]:
        """Hidden states of the full context's latent tokens after each layer, [tokens, hidden_size] each: good until
        the next one is asked for. Step caches are not told of it."""
        return self.here.layers(x, time, self.full)
