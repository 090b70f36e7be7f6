"""Many schedules at once on the demo checkpoint: pictures by each, and how far they are from exact ones.

All draw the same scenes from the same noise, in one batch, as `sampler` watches a training; what a schedule predicts is
not computed. Its pictures are compared with those of which every evaluation is computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_bagel.sampling.guidance import Guidance
from lowmem_bagel.sampling.schedule import shifted
from lowmem_bagel.settings import PictureSettings, defaults_of, options_of

from .dual import Middle
from .extending import extended
from .forward import Watch, unwatched
from .schedules import EXACT, Dual, Plan, Schedule
from .tasks import Task

ROWS = 2048
"""Contexts that go through the model at a time."""


class Followed:
    """One schedule on all scenes of a task: what it knows of each branch.

    Attributes:
        evaluations: of one scene so far, on average.
    """

    def __init__(self, schedule: Schedule, names: Sequence[str], steps: int, guidance: Guidance) -> None:
        self.schedule, self.guidance, self.evaluations = schedule, guidance, 0.0
        rarer = dict(zip(names, (1, *schedule.rarer), strict=False))
        self.rarer = {name for name in names if rarer[name] > 1}
        self.computes = {name: set(schedule.rare_steps(steps, rarer[name])) for name in names}
        self.known: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in names}
        self.differences: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in names}
        self.ended: Tensor | None = None
        """Scenes whose guidance by the text has stopped: bool [scenes]."""

    def guided(self, t: float) -> bool:
        return t > self.schedule.ends and self.guidance.active(t)

    def wants(self, name: str, step: int, t: float) -> bool:
        """Whether the branch is computed at this step."""
        if (name != "full" and not self.guided(t)) or (name == "text" and self._share() == 0):
            return False
        return step in self.computes[name] or not self.known[name]

    def _share(self) -> float:
        """Of scenes that are guided by the text."""
        return 1.0 if self.ended is None else 1 - float(self.ended.float().mean())

    def velocity(self, place: float, t: float, computed: Mapping[str, Tensor]) -> Tensor:
        """The guided velocity [scenes, tokens, values]; `place` is the step's time as the polynomial has it."""
        for name, found in computed.items():
            self.known[name] = [*self.known[name], (place, found)][-(self.schedule.order + 1) :]
            self.evaluations += self._share() if name == "text" else 1
        full = computed["full"] if "full" in computed else self._extended("full", place)
        if not self.guided(t):
            return full
        others = [self._other(name, place, full, computed) for name in self.known if name != "full"]
        return combined(self.guidance, full, *others)

    def _extended(self, name: str, place: float) -> Tensor:
        return extended(self.known[name], place, self.schedule.order, self.schedule.damped)

    def _other(self, name: str, place: float, full: Tensor, computed: Mapping[str, Tensor]) -> Tensor:
        """The velocity of one of guidance's branches."""
        if name in computed:
            kept = [*self.differences[name], (place, full - computed[name])]
            self.differences[name] = kept[-(self.schedule.rarer_order + 1) :]
            found = computed[name]
        elif name in self.rarer:
            found = full - extended(self.differences[name], place, self.schedule.rarer_order)
        elif self._share() == 0:
            return full
        else:
            found = self._extended(name, place)
        return self._unless_ended(full, found, name in computed) if name == "text" else found

    def _unless_ended(self, full: Tensor, text: Tensor, is_new: bool) -> Tensor:
        """The text's branch, or the full one where the difference has become small: then guidance changes nothing."""
        if not self.schedule.stops:
            return text
        if self.ended is None:
            self.ended = torch.zeros(len(full), dtype=torch.bool, device=full.device)
        if is_new:
            difference = (full - text).norm(dim=(1, 2)) / full.norm(dim=(1, 2))
            self.ended = self.ended | (difference < self.schedule.stops)
        return torch.where(self.ended[:, None, None], full, text)


def combined(guidance: Guidance, *velocities: Tensor) -> Tensor:
    """The guided velocity of every scene, of its branches' [scenes, tokens, values]: a norm may be over a picture."""

    def one(full: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        return guidance.combine(full, text, image)

    return torch.vmap(one)(*velocities)


@dataclass(frozen=True)
class Drawn:
    """Pictures by one schedule.

    latents: float32 [scenes, tokens, values]. evaluations: of a scene on average, a part of one where a part of the
    layers is computed. whole: those that went through all layers.
    """

    latents: Tensor
    evaluations: float
    whole: float


@torch.no_grad()
def draw(task: Task, plans: Sequence[Plan], timesteps: int = 50) -> list[Drawn]:
    """Pictures by every schedule."""
    drawn: dict[int, Drawn] = {}
    for group in _batches(plans, max(1, ROWS // len(task.noise))):
        batch = [plans[index] for index in group]
        if isinstance(batch[0], Dual):
            found = _draw_dual(task, [plan for plan in batch if isinstance(plan, Dual)], timesteps)
        else:
            found = _draw_batch(task, [plan for plan in batch if isinstance(plan, Schedule)], timesteps)
        drawn |= dict(zip(group, found, strict=True))
    return [drawn[index] for index in range(len(plans))]


def _batches(plans: Sequence[Plan], most: int) -> Iterator[list[int]]:
    """Indices of those that are drawn together: all that are no `Dual`, and those alike in layers and order."""
    alike: dict[tuple[int, int, int, float] | None, list[int]] = {}
    for index, plan in enumerate(plans):
        shape = (plan.front, plan.back, plan.order, plan.damped) if isinstance(plan, Dual) else None
        alike.setdefault(shape, []).append(index)
    for shape, indices in alike.items():
        step = most if shape else len(indices)
        yield from (indices[start : start + step] for start in range(0, len(indices), step))


def _defaults(task: Task, timesteps: int) -> tuple[Guidance, list[float]]:
    """Guidance, and the time of every step and of the end."""
    settings = defaults_of(options_of(PictureSettings, editing=task.editing))
    guidance = Guidance(
        settings["cfg_text_scale"], settings["cfg_img_scale"], settings["cfg_interval"], settings["cfg_renorm_type"],
        settings["cfg_renorm_min"],
    )  # fmt: skip
    return guidance, [shifted(u, settings["timestep_shift"]) for u in torch.linspace(1, 0, timesteps).tolist()]


def _draw_batch(task: Task, schedules: Sequence[Schedule], timesteps: int) -> list[Drawn]:
    guidance, times = _defaults(task, timesteps)
    followed = [Followed(schedule, task.names, timesteps - 1, guidance) for schedule in schedules]
    x = task.noise[None].repeat(len(schedules), 1, 1, 1)
    for step, (t, following) in enumerate(pairwise(times)):
        computed: list[dict[str, Tensor]] = [{} for _ in schedules]
        for name in task.names:
            chosen = [index for index, one in enumerate(followed) if one.wants(name, step, t)]
            for index, found in zip(chosen, _computed(task, name, x[chosen], t), strict=True):
                computed[index][name] = found
        for index, one in enumerate(followed):
            place = float(step) if one.schedule.over == "u" else t  # steps are equally far apart in u
            x[index] -= one.velocity(place, t, computed[index]) * (t - following)
    return [Drawn(found, one.evaluations, one.evaluations) for found, one in zip(x, followed, strict=True)]


def _draw_dual(task: Task, duals: Sequence[Dual], timesteps: int) -> list[Drawn]:
    guidance, times = _defaults(task, timesteps)
    scenes, layers = len(task.noise), len(task.sampler.bagel.decoder.layers)
    x = task.noise[None].repeat(len(duals), 1, 1, 1)
    tokens = task.noise.shape[1]
    middles = {name: Middle(duals, scenes, layers, timesteps - 1, tokens) for name in task.names}
    for step, (t, following) in enumerate(pairwise(times)):
        names = task.names if guidance.active(t) else task.names[:1]
        found = []
        for name in names:
            middles[name].begin(step)
            found.append(torch.cat(list(_computed(task, name, x, t, middles[name]))))
        velocity = found[0] if len(found) == 1 else combined(guidance, *found)
        x -= velocity.view(x.shape) * (t - following)
    whole = sum((middle.whole for middle in middles.values()), torch.zeros(len(duals)))
    skipped = sum((middle.skipped for middle in middles.values()), torch.zeros(len(duals)))
    parts = [(dual.front + dual.back) / layers for dual in duals]
    return [
        Drawn(latents, float(w) + float(s) * part, float(w))
        for latents, w, s, part in zip(x, whole, skipped, parts, strict=True)
    ]


def _computed(task: Task, name: str, x: Tensor, t: float, watch: Watch = unwatched) -> Sequence[Tensor]:
    """A branch's velocities [scenes, tokens, values] of every schedule's pictures x [schedules, scenes, ...]."""
    if not len(x):
        return []
    scenes = torch.arange(x.shape[1], device=x.device).repeat(len(x))
    found = []
    for part, rows in zip(scenes.split(ROWS), x.flatten(0, 1).split(ROWS), strict=True):
        times = torch.full((len(part),), t, device=x.device)
        found += task.sampler.velocities([task.group(name, part, rows, times)], watch)
    return torch.cat(found).float().view(x.shape).unbind(0)


@dataclass(frozen=True)
class Found:
    """What a schedule costs, and its pictures' distances from exact ones: the median scene's and the worst one's, of
    the half of the scenes that chooses and of the half that reports."""

    family: str
    plan: Plan
    evaluations: float
    whole: float
    chosen_on: tuple[float, float]
    reported_on: tuple[float, float]

    def row(self) -> list[float | str]:
        """Of a record."""
        numbers = (self.evaluations, self.whole, *self.chosen_on, *self.reported_on)
        return [str(self.plan), *(round(number, 4) for number in numbers)]


def searched(task: Task, plans: Sequence[tuple[str, Plan]], lot: int, seconds: float) -> Iterator[Found]:
    """What is found of each, `lot` in one batch, as far as the time reaches."""
    started = time.monotonic()
    exact = task.sampler.pictures(draw(task, [EXACT])[0].latents)
    for start in range(0, len(plans), lot):
        if time.monotonic() - started > seconds:
            return
        part = plans[start : start + lot]
        for (family, plan), drawn in zip(part, draw(task, [plan for _, plan in part]), strict=True):
            far = distances(task, drawn.latents, exact)
            halves = (far[: len(far) // 2], far[len(far) // 2 :])
            median_and_worst = [(float(np.median(half)), float(half.max())) for half in halves]
            yield Found(family, plan, drawn.evaluations, drawn.whole, *median_and_worst)


def distances(task: Task, latents: Tensor, exact: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean distance of every scene's picture from the exact one, in levels of 255: [scenes]."""
    pictures = task.sampler.pictures(latents).astype(np.float64)
    return np.asarray(np.abs(pictures - exact).mean(axis=(1, 2, 3)))
