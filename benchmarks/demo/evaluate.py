"""Judges a demo checkpoint, or a variant of it, on scenes that were not trained on, through the ordinary pipeline.

`lowmem-bagel bench accuracy` asks, and writes the record.

Every scene holds a combination of shape, colour and background that training never shows. Pictures are judged by
`classifier`, answers by equality.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .classifier import judge_drawing, judge_edit
from .clip_cases import CASES, judge_case, kept, within
from .clips import SIDE
from .scenes import Edit, Scene, held_out_scene, random_edit, render
from .sentences import Question, caption, instruction, question

if TYPE_CHECKING:
    from lowmem_bagel import BagelPipeline

Request = TypeVar("Request")


@dataclass
class Tally:
    """Right and wrong results of one task, in all and by kind."""

    total: int = 0
    right: int = 0
    by_kind: dict[str, list[int]] = field(default_factory=dict)
    """[right, total] per kind."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[NDArray[np.uint8]] = field(default_factory=list)
    """All that were drawn, [height, width, 3] each."""
    marks: Counter[str] = field(default_factory=Counter)
    """How many have what else is counted, by name."""

    def add(self, kind: str, text: str, faults: list[str]) -> None:
        self.total += 1
        self.right += not faults
        right, total = self.by_kind.get(kind, (0, 0))
        self.by_kind[kind] = [right + (not faults), total + 1]
        if faults:
            self.faults.append({"text": text, "faults": faults})

    def join(self, later: Tally) -> None:
        """Add the results of requests that come after its own."""
        self.total += later.total
        self.right += later.right
        for kind, (right, total) in later.by_kind.items():
            before = self.by_kind.get(kind, (0, 0))
            self.by_kind[kind] = [before[0] + right, before[1] + total]
        self.faults += later.faults
        self.pictures += later.pictures
        self.marks.update(later.marks)


def evaluate_drawings(pipe: BagelPipeline, numbers: range, seed: int, settings: dict[str, Any]) -> Tally:
    """Draw captions; right is the right shapes, colours, number and, where named, background and relation."""
    rng, tally = Random(seed), Tally()
    for number, sentence in _asked(lambda: caption(rng, held_out_scene(rng)), numbers, "drawings", tally):
        scene = sentence.scene
        result = pipe.generate(sentence.text, seed=seed + number, height=scene.height, width=scene.width, **settings)
        asked = "a group" if scene.is_group else "related" if sentence.names_relation else "listed"
        kind = "1 shape" if len(scene.items) == 1 else f"{len(scene.items)} shapes, {asked}"
        tally.pictures.append(np.asarray(result.image))
        tally.add(kind, sentence.text, judge_drawing(tally.pictures[-1], sentence))
    return tally


def evaluate_edits(pipe: BagelPipeline, numbers: range, seed: int, settings: dict[str, Any]) -> Tally:
    """Edit true renders; right is every shape of the target in its place, and nothing else."""
    from PIL import Image

    rng, tally = Random(seed + 1), Tally()

    def wanted() -> tuple[Edit, str]:
        edit = random_edit(rng, held_out_scene(rng))
        return edit, instruction(rng, edit)

    for number, (edit, order) in _asked(wanted, numbers, "edits", tally):
        result = pipe.edit(Image.fromarray(render(edit.source)), order, seed=seed + number, **settings)
        tally.pictures.append(np.asarray(result.image))
        tally.add(edit.kind, order, judge_edit(tally.pictures[-1], edit.target))
    return tally


def evaluate_frames(
    case: str,
    pipe: BagelPipeline,
    numbers: range,
    seed: int,
    settings: dict[str, Any],
    guidance: Mapping[str, float] = MappingProxyType({}),
) -> Tally:
    """Draw requests of `clip_cases.CASES`; right is every frame, shapes, colours and places, and nothing else.

    Marks: those whose shapes are all in their places (`within`), and those whose shapes and colours are (`kept`).
    """
    from PIL import Image

    rng, tally = Random(seed + 3), Tally()
    for number, asked in _asked(lambda: CASES[case](rng), numbers, case, tally):
        shown = [Image.fromarray(render(scene)) for scene in asked.shown]
        size = {} if shown else {"height": SIDE, "width": SIDE}
        drawing: dict[str, Any] = {**size, **settings, **guidance, "frames": asked.frames, "seed": seed + number}
        result = pipe.run([*shown, asked.text], **drawing)
        drawn = [np.asarray(image) for image in result.images]
        judged = judge_case(asked, drawn)
        tally.pictures += drawn
        tally.marks.update(within=int(within(judged)), kept=int(kept(judged)))
        # Many are asked the same, so the number tells them apart.
        tally.add(asked.kind, f"{number}: {asked.text}", [fault for frame in judged for fault in frame.faults])
    return tally


def evaluate_answers(pipe: BagelPipeline, numbers: range, seed: int, settings: dict[str, Any] | None = None) -> Tally:
    """Ask questions about true renders; right is the answer, letter for letter. `settings` are of pictures."""
    from PIL import Image

    rng, tally = Random(seed + 2), Tally()

    def wanted() -> tuple[Scene, Question]:
        scene = held_out_scene(rng)
        return scene, question(rng, scene)

    for _, (scene, asked) in _asked(wanted, numbers, "answers", tally):
        answer = pipe.ask(asked.text, Image.fromarray(render(scene))).text
        wrong = [] if answer == asked.answer else [f"{answer!r}, not {asked.answer!r}"]
        tally.add(asked.kind, asked.text, wrong)
    return tally


def _asked(make: Callable[[], Request], numbers: range, what: str, tally: Tally) -> Iterator[tuple[int, Request]]:
    """The requests of these numbers. Those before them are made too, as each takes what its forerunners left of the
    random numbers: so a request is the same whoever judges those around it."""
    started = time.monotonic()
    for number in range(numbers.stop):
        request = make()
        if number not in numbers:
            continue
        yield number, request
        if (number + 1) % 50 == 0 or number + 1 == numbers.stop:
            print(f"{what}: {tally.right} of {tally.total} right, {time.monotonic() - started:.0f} s")


Evaluate = Callable[["BagelPipeline", range, int, dict[str, Any]], Tally]
UNGUIDED = {"cfg_text_scale": 1.0, "cfg_img_scale": 1.0}
LIGHT = {"cfg_text_scale": 1.5, "cfg_img_scale": 1.5}
"""More pulls shapes off the places that the frames shown tell; see docs/frames.md."""
CLIPS: dict[str, Evaluate] = {
    **{case: partial(evaluate_frames, case) for case in CASES},
    "future-unguided": partial(evaluate_frames, "future", guidance=UNGUIDED),
    "future-light": partial(evaluate_frames, "future", guidance=LIGHT),
}
TASKS: dict[str, Evaluate] = {
    "answers": evaluate_answers, "drawings": evaluate_drawings, "edits": evaluate_edits, **CLIPS,
}  # fmt: skip
"""What is judged, by name: each is handed the pipeline, the requests' numbers, a seed and the pictures' settings."""
