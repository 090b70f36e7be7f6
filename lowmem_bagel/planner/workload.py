"""What a plan is made for: tasks, sizes and guidance, and the limits it must keep. Pure; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, TypeAlias

from ..checkpoint.config import BagelConfig
from ..checkpoint.tensors import EXPERTS, Expert
from ..sampling.schedule import shifted
from ..sampling.step_caches.registry import step_cache
from ..settings import TASKS, FrameMode, Task
from .compute import Overrides
from .memory import MARKERS, Workload

Wish: TypeAlias = Literal["auto"] | int | None
"""Bytes for contexts that repeat; None for none."""


@dataclass(frozen=True)
class Limits:
    """What a plan may take, in bytes, None for all that is free; and settings that were made by hand."""

    max_vram: int | None = None
    max_ram: int | None = None
    overrides: Overrides = field(default_factory=Overrides)
    context_store: Wish = None


@dataclass(frozen=True)
class Conversation:
    """Answers in texts and pictures: `rounds` pictures at most, `new_tokens` of each text, and as many such turns in
    the contexts."""

    rounds: int
    new_tokens: int = 512
    turns: int = 1


@dataclass(frozen=True)
class Request:
    """The largest request that a plan must hold, and the first task's is the one whose seconds are predicted.

    height and width are pixels of the picture drawn and of the input pictures; `image_scale` None is the task's
    default. `text_tokens` is room for each prompt, `new_tokens` the length of an answer or a plan.
    """

    tasks: tuple[Task, ...] = TASKS
    height: int = 1024
    width: int = 1024
    input_pictures: int = 1
    text_scale: float = 4.0
    image_scale: float | None = None
    timesteps: int = 50
    shift: float = 3.0
    think: bool = False
    text_tokens: int = 256
    new_tokens: int = 128
    step_cache: str = "none"
    """A name in `sampling.step_caches.registry`."""
    frames: int = 1
    frame_mode: FrameMode = "together"
    conversation: Conversation | None = None
    """Beside the tasks, with as many input pictures in each turn."""

    @cached_property
    def experts(self) -> frozenset[Expert]:
        """Answers need und alone."""
        return frozenset({"und"}) if set(self.tasks) == {"ask"} else frozenset(EXPERTS)

    @cached_property
    def idle_parts(self) -> frozenset[str]:
        """Stageable parts that these tasks do not use, or look rows up in: they wait in RAM at no cost."""
        idle = set()
        if "ask" not in self.tasks:
            idle.add("embedding")
            if not self.think:
                idle.add("lm_head")
        looked_at = self.frames > 1 and self.frame_mode == "turn" and set(self.tasks) != {"ask"}
        looked_at = looked_at or self.conversation is not None
        if (set(self.tasks) == {"generate"} or not self.input_pictures) and not looked_at:
            idle.add("vit")
        return frozenset(idle)

    def workloads(self, config: BagelConfig) -> Sequence[Workload]:
        """What each task asks for, in the order of the tasks, and then what a conversation does."""
        tasks = [self._workload(task, config) for task in self.tasks]
        return tasks if self.conversation is None else [*tasks, self._last_turn(self.conversation, config)]

    def _last_turn(self, asked: Conversation, config: BagelConfig) -> Workload:
        """Of a conversation whose turns before are as long."""
        drawing = replace(self, frames=1, think=False)._workload("edit", config)
        first = answered(drawing, config, asked.rounds, asked.new_tokens)
        turn = first.cached_tokens - first.picture_tokens
        last = replace(first, prefilled=(asked.turns - 1) * turn)
        return replace(last, kept_tokens=asked.turns * turn)

    def _workload(self, task: Task, config: BagelConfig) -> Workload:
        grid = (max(1, self.height // config.token_pixels), max(1, self.width // config.token_pixels))
        pictures = 0 if task == "generate" else self.input_pictures
        patch, longest = config.vit.patch_size, config.vit_resize.max_side
        scale = min(1.0, longest / max(self.height, self.width))
        vit_tokens = round(self.height * scale / patch) * round(self.width * scale / patch)
        if task == "ask":
            return Workload(task, (0, 0), [grid] * pictures, vit_tokens, self.text_tokens, self.new_tokens, 1, 0, 0)
        image_scale = self.image_scale if self.image_scale is not None else (2.0 if task == "edit" else 1.0)
        branches = 1
        if self.text_scale > 1:
            branches += 1 + (image_scale > 1 and pictures > 0)
        interval = (0.0, 1.0) if task == "edit" else (0.4, 1.0)
        evaluations = self.timesteps - 1
        guided = guided_steps(self.timesteps, self.shift, interval) if branches > 1 else 0
        cache = step_cache(self.step_cache)
        turns = self.frames if self.frame_mode == "turn" else 1
        returned, seen = seen_grid(config, self.width, self.height)
        return Workload(
            task,
            grid,
            [*[grid] * pictures, *[returned] * (turns - 1)],
            max(vit_tokens, seen) if turns > 1 else vit_tokens,
            self.text_tokens,
            self.new_tokens if self.think else 0,
            branches,
            cache.computed(guided),
            cache.computed(evaluations),
            cache,
            cache.stored(evaluations),
            frames=self.frames if self.frame_mode == "together" else 1,
            turns=turns,
            vit_each=[*[vit_tokens] * pictures, *[seen] * (turns - 1)] if turns > 1 else (),
        )


def answered(drawing: Workload, config: BagelConfig, rounds: int, new_tokens: int) -> Workload:
    """An answer in texts and pictures, each drawn as in `drawing` and then given back."""
    rows, columns = drawing.grid
    returned, seen = seen_grid(config, columns * config.token_pixels, rows * config.token_pixels)
    each = [*drawing.seen_tokens, *[seen] * rounds]
    return replace(
        drawing,
        grid=drawing.grid if rounds else (0, 0),
        input_grids=[*drawing.input_grids, *[returned] * rounds],
        vit_tokens=max(each, default=0),
        vit_each=each,
        new_tokens=(rounds + 1) * (new_tokens + MARKERS),
        said=rounds + 1,
    )


def seen_grid(config: BagelConfig, width: int, height: int) -> tuple[tuple[int, int], int]:
    """Rows and columns of latent tokens of a picture that is encoded, and tokens of the vision tower."""
    encoded = config.vae_resize.resized(width, height)
    seen, side, patch = config.vit_resize.resized(*encoded), config.token_pixels, config.vit.patch_size
    return (encoded[1] // side, encoded[0] // side), (seen[0] // patch) * (seen[1] // patch)


def most_frames(fits: Callable[[int], bool], wanted: int) -> int:
    """How many frames fit of more than one that do not: 0 where not even one does."""
    most, too_many = 0, wanted
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    return most


def guided_steps(timesteps: int, shift: float, interval: tuple[float, float]) -> int:
    """Steps at a time t with interval[0] < t <= interval[1]; one step fewer than times."""
    times = (shifted(1 - index / (timesteps - 1), shift) for index in range(timesteps - 1))
    return sum(interval[0] < t <= interval[1] for t in times)
