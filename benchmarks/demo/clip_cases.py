"""Held-out requests for clips and views, and what is right of what was drawn: place, shape and color, frame by frame.

A kind of request is one entry of `CASES`. Who draws is a `Painter`: the trainer's own forward, or the pipeline.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import clips
from .classifier import Reading, Region, judge_drawing, read_picture, stray_faults
from .scenes import Item, Scene, held_out_scene, render
from .sentences import Caption

Picture = NDArray[np.uint8]
WITHIN = 3.0
"""Pixels that a shape's centre may be off."""


@dataclass(frozen=True)
class Case:
    """One request: pictures, a text, and how many frames are to be drawn.

    expected: what each frame must show, of which some depends on the first frame that was drawn.
    told: the caption that the first frame must show, where a caption tells it.
    """

    kind: str
    text: str
    shown: tuple[Scene, ...]
    frames: int
    expected: Callable[[Reading], Sequence[Scene]]
    told: Caption | None = None


class Painter(Protocol):
    """Draws the frames of cases with as many pictures and frames as each other: for each a list of
    uint8 [height, width, 3]."""

    def __call__(self, texts: list[str], shown: list[list[Picture]], frames: int, seed: int) -> list[list[Picture]]: ...


def _future(rng: Random) -> Case:
    clip = clips.held_out_clip(rng)
    named = rng.random() < 0.5
    frames = [clip.frame(number) for number in range(clips.FRAMES)]
    order = clips.order_to_continue(rng, clip, named)
    kind = "the rule is told" if named else "left to the frames"
    return Case(kind, order, tuple(frames[: clips.GIVEN]), clips.NEXT, lambda first: frames[clips.GIVEN :])


def _told(rng: Random) -> Case:
    clip, count = clips.held_out_clip(rng), rng.randint(2, clips.TOLD)

    def expected(first: Reading) -> list[Scene]:
        items = tuple(_as_drawn(item, first) for item in clip.scene.items)
        anchored = replace(clip, scene=replace(clip.scene, items=items))
        return [anchored.frame(number) for number in range(count)]

    return Case(f"{count} frames", clips.clip_caption(rng, clip), (), count, expected)


def _as_drawn(item: Item, first: Reading) -> Item:
    """The shape where and as the first frame has it, which a sentence leaves open."""
    same = next((r for r in first.regions if (r.shape, r.colour) == item.kind), None)
    return item if same is None else replace(item, x=same.x, y=same.y, angle=same.angle)


def _view(rng: Random) -> Case:
    scene = held_out_scene(rng, (clips.SIDE, clips.SIDE))
    views = rng.choice(clips.view_pairs())[: rng.randint(1, 2)]
    seen = [clips.seen_from(scene, view) for view in views]
    return Case(", ".join(views), clips.order_to_view(rng, views), (scene,), len(views), lambda first: seen)


def _views(rng: Random) -> Case:
    scene, view = held_out_scene(rng, (clips.SIDE, clips.SIDE)), rng.choice(list(clips.VIEWS))
    said, text = clips.views_caption(rng, scene, view)

    def expected(first: Reading) -> list[Scene]:
        items = tuple(Item(r.shape, r.colour, "", r.x, r.y, 1.0, r.angle) for r in first.regions)
        front = Scene(items, first.background, clips.SIDE, clips.SIDE)
        return [front, clips.seen_from(front, view)]

    return Case(view, text, (), 2, expected, said)


CASES: dict[str, Callable[[Random], Case]] = {"future": _future, "clip": _told, "view": _view, "views": _views}


@dataclass(frozen=True)
class Judged:
    """One frame. distance: pixels from where its shapes belong to where they are, the largest; infinite where their
    number is another."""

    distance: float
    shapes: bool
    colours: bool
    faults: tuple[str, ...]


def judge_frame(reading: Reading, wanted: Scene) -> Judged:
    """Shapes are matched to the nearest regions; sizes are free."""
    faults = list(stray_faults(reading))
    if reading.background != wanted.background:
        faults.append(f"background {reading.background}, not {wanted.background}")
    if len(reading.regions) != len(wanted.items):
        faults.append(f"{len(reading.regions)} shapes, not {len(wanted.items)}")
        return Judged(math.inf, False, False, tuple(faults))
    left, distances, shapes, colours = list(reading.regions), [], True, True
    for item in wanted.items:
        found = min(left, key=lambda region: _apart(region, item))
        left = [region for region in left if region is not found]
        distances.append(_apart(found, item))
        shapes &= (found.shape, found.angle) == (item.shape, item.angle)
        colours &= found.colour == item.colour
        if distances[-1] > WITHIN:
            faults.append(f"the {item.colour} {item.shape} is {distances[-1]:.1f} pixels off")
        if (found.shape, found.angle, found.colour) != (item.shape, item.angle, item.colour):
            is_, belongs = (f"{i.colour} {i.shape} at {i.angle:.0f} degrees" for i in (found, item))
            faults.append(f"a {is_} where a {belongs} belongs")
    return Judged(max(distances, default=0.0), shapes, colours, tuple(faults))


def _apart(region: Region, item: Item) -> float:
    return math.hypot(region.x - item.x, region.y - item.y)


def judge_case(case: Case, drawn: Sequence[Picture]) -> list[Judged]:
    """Frame by frame."""
    assert len(drawn) == case.frames
    readings = [read_picture(picture, angles=clips.ANGLES) for picture in drawn]
    judged = [judge_frame(r, wanted) for r, wanted in zip(readings, case.expected(readings[0]), strict=True)]
    if case.told is not None and (faults := judge_drawing(drawn[0], case.told)):
        judged[0] = replace(judged[0], shapes=False, colours=False, faults=(*judged[0].faults, *faults))
    return judged


def measure(name: str, paint: Painter, count: int, seed: int) -> dict[str, Any]:
    """`count` held-out cases of a kind, those with as many pictures and frames drawn together; with what was drawn."""
    rng = Random(seed)
    cases = [CASES[name](rng) for _ in range(count)]
    drawn: dict[int, list[Picture]] = {}
    for size in sorted({(len(case.shown), case.frames) for case in cases}):
        alike = [at for at, case in enumerate(cases) if (len(case.shown), case.frames) == size]
        shown = [[render(scene) for scene in cases[at].shown] for at in alike]
        drawn |= dict(zip(alike, paint([cases[at].text for at in alike], shown, size[1], seed), strict=True))
    judged = [judge_case(case, drawn[at]) for at, case in enumerate(cases)]
    return {**summary(cases, judged), "pictures": [drawn[at] for at in range(count)]}


def summary(cases: Sequence[Case], judged: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    """How many cases are `within`, `kept`, and right, which is both and nothing else to object to; and of how many
    each frame is within: one that is off by a step was taken for its neighbour."""
    by_kind: dict[str, list[int]] = {}
    for case, frames in zip(cases, judged, strict=True):
        right, total = by_kind.get(case.kind, [0, 0])
        by_kind[case.kind] = [right + _right(frames), total + 1]
    distances = sorted(min(frame.distance, 999.0) for frames in judged for frame in frames)
    return {
        "total": len(cases),
        "within": sum(map(within, judged)),
        "within_by_frame": [
            [sum(within([frames[at]]) for frames in there), len(there)]
            for at in range(max(map(len, judged)))
            for there in [[frames for frames in judged if len(frames) > at]]
        ],
        "kept": sum(map(kept, judged)),
        "right": sum(map(_right, judged)),
        "by_kind": by_kind,
        "median_distance": round(statistics.median(distances), 2),
        "distance_of_95_percent": round(distances[int(0.95 * (len(distances) - 1))], 2),
        "frames_kept": sum(frame.shapes and frame.colours for frames in judged for frame in frames),
        "frames": len(distances),
        "faults": [
            {"text": case.text, "faults": [list(frame.faults) for frame in frames]}
            for case, frames in zip(cases, judged, strict=True)
            if not _right(frames)
        ],
    }


def within(frames: Sequence[Judged]) -> bool:
    """Whether all shapes are where they belong, in all frames."""
    return all(frame.distance <= WITHIN for frame in frames)


def kept(frames: Sequence[Judged]) -> bool:
    """Whether all shapes and colors are what they must be, in all frames."""
    return all(frame.shapes and frame.colours for frame in frames)


def _right(frames: Sequence[Judged]) -> bool:
    return not any(frame.faults for frame in frames)
