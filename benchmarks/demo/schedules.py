"""Which evaluations of a picture can be predicted, and how: many schedules at once on the demo checkpoint.

All schedules draw the same scenes from the same noise, in one batch, as `sampler` watches a training; what a schedule
predicts is not computed. Its pictures are compared with those of which every evaluation is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowmem_bagel.sampling.guidance import Guidance
from lowmem_bagel.sampling.schedule import shifted
from lowmem_bagel.sampling.step_caches.velocity import EARLY, Pattern
from lowmem_bagel.settings import PictureSettings, defaults_of, options_of

from .data import CAPTION_TOKENS, INSTRUCTION_TOKENS
from .draw import render_rows, scene_rows, to_signed, vit_patches
from .forward import Group, text_lengths
from .sampler import Sampler
from .scenes import held_out_scene, random_edit
from .sentences import caption, instruction
from .train import draw_group, draw_shape, edit_group, edit_shape
from .train_vae import latent_tokens

ROWS = 2048
"""Contexts that go through the model at a time."""


@dataclass(frozen=True)
class Schedule:
    """Which steps of a branch are computed, and how the others are predicted from those.

    first: so many at the start are computed. intervals: from which step on one in how many is. last: so is the last
    step. order: of the polynomial through the last computed ones, 0 for repeating. over: what it is a polynomial of: t,
    or u, the time before the shift. rarer: 1 where the guidance's branches are computed as often as the full one; else
    so much more rarely, and their difference from it is predicted instead, by order `rarer_order`. ends: guidance
    stops at this t.
    """

    first: int
    intervals: tuple[tuple[int, int], ...]
    last: bool = False
    order: int = 1
    over: str = "u"
    rarer: int = 1
    rarer_order: int = 0
    ends: float = 0.0

    def steps(self, count: int) -> list[int]:
        """Of so many steps those that are computed."""
        pattern, found = Pattern(self.first, self.intervals), [0]
        while (step := pattern.following(found[-1])) < count:
            found.append(step)
        return sorted({*found, *([count - 1] if self.last else [])})

    def rare_steps(self, count: int) -> list[int]:
        """Those of guidance's branches."""
        steps = self.steps(count)
        return steps if self.rarer == 1 else sorted({*steps[: self.first], *steps[self.first - 1 :: self.rarer]})


EXACT = Schedule(1, ((0, 1),))


def all_schedules(editing: bool) -> Iterator[Schedule]:
    """What is searched."""
    constant = [((0, n),) for n in range(2, 11)]
    yield Schedule(EARLY.first, EARLY.intervals)
    turns = [((0, a), (at, b)) for a, b in itertools.permutations((2, 3, 4, 5, 6, 8), 2) for at in (8, 16, 24, 32)]
    for first, intervals, order, over in itertools.product((1, 2, 3, 5), [*constant, *turns], (1, 2), "tu"):
        yield Schedule(first, intervals, order=order, over=over)
    for first, intervals, order in itertools.product((2, 3, 5), constant, (0, 3)):
        yield Schedule(first, intervals, order=order)
    for first, intervals in itertools.product((1, 2, 3), constant):
        yield Schedule(first, intervals, last=True)
        for rarer, order in itertools.product((2, 3), (0, 1)):
            yield Schedule(first, intervals, rarer=rarer, rarer_order=order)
        for ends in () if editing else (0.5, 0.6, 0.7):
            yield Schedule(first, intervals, ends=ends)


class Drawings:
    """Captions to draw."""

    names = ("full", "text")
    editing = False

    def __init__(self, sampler: Sampler, count: int, seed: int) -> None:
        canvas = (sampler.canvas.height, sampler.canvas.width)
        self.sampler, rng = sampler, Random(seed)
        texts = [caption(rng, held_out_scene(rng, canvas)).text for _ in range(count)]
        self.ids = sampler._ids(texts, CAPTION_TOKENS)
        self.lengths = text_lengths(self.ids, sampler.pad)
        self.shape = draw_shape(sampler.rows * sampler.columns).to(sampler.bagel.device)
        self.noise = _noise(sampler, count, torch.Generator().manual_seed(seed))

    def group(self, name: str, scenes: Tensor, x: Tensor, t: Tensor) -> Group:
        """The branch's contexts of some scenes, with the pictures x at times t."""
        lengths = self.lengths[scenes] * (name == "full")
        return draw_group(self.sampler.embed, self.shape, self.ids[scenes], lengths, x, t)


class Edits:
    """Pictures to edit."""

    names = ("full", "text", "image")
    editing = True

    def __init__(self, sampler: Sampler, count: int, seed: int) -> None:
        canvas, device, rng = (sampler.canvas.height, sampler.canvas.width), sampler.bagel.device, Random(seed)
        edits = [random_edit(rng, held_out_scene(rng, canvas)) for _ in range(count)]
        pictures = render_rows(torch.from_numpy(scene_rows([edit.source for edit in edits])).to(device), sampler.canvas)
        self.sampler, self.ids = sampler, sampler._ids([instruction(rng, edit) for edit in edits], INSTRUCTION_TOKENS)
        self.lengths = text_lengths(self.ids, sampler.pad)
        self.shape = edit_shape(sampler.rows * sampler.columns).to(device)
        mean, logvar = sampler.vae.encoder(to_signed(pictures)).chunk(2, dim=1)
        generator = torch.Generator().manual_seed(seed)
        latent = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator).to(mean)
        self.source = (latent_tokens(latent) - sampler.shift) * sampler.scale
        self.seen = sampler.embed.pictures(vit_patches(pictures, 14, 16))
        self.noise = _noise(sampler, count, generator)

    def group(self, name: str, scenes: Tensor, x: Tensor, t: Tensor) -> Group:
        """As `Drawings.group`."""
        there = torch.full_like(self.lengths[scenes], name != "image")
        lengths = self.lengths[scenes] * (name != "text")
        source, seen = self.source[scenes], self.seen[scenes]
        return edit_group(self.sampler.embed, self.shape, source, seen, there, self.ids[scenes], lengths, x, t)


Task = Drawings | Edits


def _noise(sampler: Sampler, count: int, generator: torch.Generator) -> Tensor:
    noise = torch.randn(count, sampler.rows * sampler.columns, 64, generator=generator)
    return noise.to(sampler.bagel.device)


class Followed:
    """One schedule on all scenes of a task: what it knows of each branch."""

    def __init__(self, schedule: Schedule, names: Sequence[str], steps: int, guidance: Guidance) -> None:
        self.schedule, self.guidance, self.evaluations = schedule, guidance, 0
        often, rarely = set(schedule.steps(steps)), set(schedule.rare_steps(steps))
        self.computes = {name: often if name == "full" else rarely for name in names}
        self.known: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in names}
        self.differences: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in names}

    def guided(self, t: float) -> bool:
        return t > self.schedule.ends and self.guidance.active(t)

    def wants(self, name: str, step: int, t: float) -> bool:
        """Whether the branch is computed at this step."""
        return (name == "full" or self.guided(t)) and (step in self.computes[name] or not self.known[name])

    def velocity(self, place: float, t: float, computed: Mapping[str, Tensor]) -> Tensor:
        """The guided velocity [scenes, tokens, values]; `place` is the step's time as the polynomial has it."""
        for name, found in computed.items():
            self.known[name].append((place, found))
            self.evaluations += 1
        order = self.schedule.order
        full = computed["full"] if "full" in computed else extended(self.known["full"], place, order)
        if not self.guided(t):
            return full
        others = [self._other(name, place, full, computed) for name in self.known if name != "full"]
        return torch.vmap(self._combined)(full, *others)  # a norm may be over a whole picture

    def _other(self, name: str, place: float, full: Tensor, computed: Mapping[str, Tensor]) -> Tensor:
        """The velocity of one of guidance's branches."""
        if name in computed:
            self.differences[name].append((place, full - computed[name]))
            return computed[name]
        if self.schedule.rarer == 1:
            return extended(self.known[name], place, self.schedule.order)
        return full - extended(self.differences[name], place, self.schedule.rarer_order)

    def _combined(self, full: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        return self.guidance.combine(full, text, image)


def extended(known: Sequence[tuple[float, Tensor]], place: float, order: int) -> Tensor:
    """The polynomial through the last order + 1 that are known, at `place`: Lagrange's form."""
    nodes = known[-(order + 1) :]
    out = torch.zeros_like(nodes[0][1])
    for here, value in nodes:
        weight = 1.0
        for other, _ in nodes:
            weight *= 1.0 if other == here else (place - other) / (here - other)
        out += weight * value
    return out


@torch.no_grad()
def draw_all(task: Task, schedules: Sequence[Schedule], timesteps: int = 50) -> tuple[Tensor, list[int]]:
    """Latents float32 [schedules, scenes, tokens, values] of one batch, and the evaluations of each schedule."""
    settings = defaults_of(options_of(PictureSettings, editing=task.editing))
    guidance = Guidance(
        settings["cfg_text_scale"], settings["cfg_img_scale"], settings["cfg_interval"], settings["cfg_renorm_type"],
        settings["cfg_renorm_min"],
    )  # fmt: skip
    u = torch.linspace(1, 0, timesteps).tolist()
    times = [shifted(place, settings["timestep_shift"]) for place in u]
    followed = [Followed(schedule, task.names, timesteps - 1, guidance) for schedule in schedules]
    x = task.noise[None].repeat(len(schedules), 1, 1, 1)
    for step, (t, following) in enumerate(pairwise(times)):
        computed: list[dict[str, Tensor]] = [{} for _ in schedules]
        for name in task.names:
            chosen = [index for index, one in enumerate(followed) if one.wants(name, step, t)]
            for index, found in zip(chosen, _computed(task, name, x[chosen], t), strict=True):
                computed[index][name] = found
        for index, one in enumerate(followed):
            place = u[step] if one.schedule.over == "u" else t
            x[index] -= one.velocity(place, t, computed[index]) * (t - following)
    return x, [one.evaluations for one in followed]


def _computed(task: Task, name: str, x: Tensor, t: float) -> Sequence[Tensor]:
    """A branch's velocities [scenes, tokens, values] of every schedule's pictures x [schedules, scenes, ...]."""
    if not len(x):
        return []
    scenes = torch.arange(x.shape[1], device=x.device).repeat(len(x))
    found = []
    for part, rows in zip(scenes.split(ROWS), x.flatten(0, 1).split(ROWS), strict=True):
        times = torch.full((len(part),), t, device=x.device)
        found += task.sampler._velocities([task.group(name, part, rows, times)])
    return torch.cat(found).float().view(x.shape).unbind(0)


def distances(task: Task, latents: Tensor, exact: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean distance of every scene's picture from the exact one, in levels of 255: [scenes]."""
    pictures = task.sampler.pictures(latents).astype(np.float64)
    return np.asarray(np.abs(pictures - exact).mean(axis=(1, 2, 3)))


def searched(task: Task, schedules: Sequence[Schedule], lot: int) -> Iterator[dict[str, Any]]:
    """Every schedule's evaluations and distances from exact pictures: the median, the worst scene, of each half."""
    latents, evaluations = draw_all(task, [EXACT])
    exact, half = task.sampler.pictures(latents[0]), len(task.noise) // 2
    yield {"schedule": vars(EXACT), "evaluations": evaluations[0], "chosen_on": [0.0, 0.0], "reported_on": [0.0, 0.0]}
    for start in range(0, len(schedules), lot):
        part = schedules[start : start + lot]
        for schedule, found, count in zip(part, *draw_all(task, part), strict=True):
            far = distances(task, found, exact)
            halves = {"chosen_on": far[:half], "reported_on": far[half:]}
            numbers = {name: [float(np.median(of)), float(of.max())] for name, of in halves.items()}
            yield {"schedule": vars(schedule), "evaluations": count, **numbers}


def frontier(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of which none has as few evaluations and both a smaller median and a smaller worst distance, by the half
    that is chosen on."""
    best: list[Mapping[str, Any]] = []
    for one in sorted(found, key=lambda row: (row["evaluations"], row["chosen_on"])):
        if all(any(a < b for a, b in zip(one["chosen_on"], other["chosen_on"], strict=True)) for other in best):
            best.append(one)
    return best
