"""Judging clips and views: true renders are right, and a frame that is wrong is told from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from lowmem_bagel.benchmarks.demo import clips, evaluate
from lowmem_bagel.benchmarks.demo.classifier import read_picture
from lowmem_bagel.benchmarks.demo.clip_cases import CASES, WITHIN, Case, Picture, judge_case, measure, summary
from lowmem_bagel.benchmarks.demo.scenes import Item, Scene, render
from lowmem_bagel.benchmarks.suites import accuracy
from PIL import Image

CLIP = clips.Clip(
    Scene(
        (Item("triangle", "red", "small", 40, 40, 15.7), Item("square", "blue", "small", 92, 92, 15.7)), "white"
    ),
    (clips.Motion("to the right", "slowly", "clockwise"), clips.STAYS),
)  # fmt: skip
TRUE = [CLIP.frame(number) for number in range(clips.GIVEN, clips.FRAMES)]
CASE = Case("any", "the next frames", (), len(TRUE), lambda first: TRUE)

Change = Callable[[Scene], Scene]


def first_item(**change: object) -> Change:
    def changed(scene: Scene) -> Scene:
        return replace(scene, items=(replace(scene.items[0], **change), *scene.items[1:]))  # type: ignore[arg-type]

    return changed


@pytest.mark.parametrize("name", ["future", "view"])
def test_true_frames_are_right(name: str) -> None:
    rng = Random(4)
    cases = [CASES[name](rng) for _ in range(6)]
    for case in cases:
        judged = judge_case(case, [render(scene) for scene in case.expected(None)])  # type: ignore[arg-type]
        assert not any(frame.faults for frame in judged)
        assert all(frame.distance < 0.5 for frame in judged)


def test_a_told_clip_may_begin_anywhere_but_must_go_on_by_its_rule() -> None:
    rng = Random(5)
    for _ in range(5):
        case = CASES["clip"](rng)
        scenes = case.expected(read_picture(render(Scene((), "white"))))  # where the held-out clip has them
        moved = [replace(s, items=tuple(replace(i, x=i.x + 1.5, y=i.y - 2.5) for i in s.items)) for s in scenes]
        assert not any(frame.faults for frame in judge_case(case, [render(s) for s in moved]))
        assert any(frame.faults for frame in judge_case(case, [render(moved[0])] * case.frames))


def test_views_of_what_was_drawn_must_agree_with_each_other_and_with_the_caption() -> None:
    rng = Random(6)
    for _ in range(5):
        case = CASES["views"](rng)
        assert case.told is not None
        front = case.told.scene
        drawn = [render(front), render(clips.seen_from(front, case.kind))]
        assert not any(frame.faults for frame in judge_case(case, drawn))
        other = replace(front, background=next(c for c in ("white", "black") if c != front.background))
        assert any(frame.faults for frame in judge_case(case, [drawn[0], render(other)]))


@pytest.mark.parametrize(
    ("change", "within", "kept"),
    [
        (first_item(x=TRUE[2].items[0].x + WITHIN + 1.5), False, True),
        (first_item(x=TRUE[2].items[0].x + WITHIN - 1.5), True, True),
        (first_item(colour="green"), True, False),
        (first_item(angle=(TRUE[2].items[0].angle + 30) % 120), True, False),
        (first_item(shape="circle", angle=0.0), True, False),
        (lambda scene: replace(scene, items=scene.items[:1]), False, False),
        (lambda scene: TRUE[1], False, False),
    ],
    ids=["off", "nearly", "colour", "angle", "shape", "lost", "frozen"],
)
def test_one_wrong_frame_is_told(change: Change, within: bool, kept: bool) -> None:
    drawn = [render(change(scene) if number == 2 else scene) for number, scene in enumerate(TRUE)]
    judged = judge_case(CASE, drawn)
    assert [bool(frame.faults) for frame in judged] == [False, False, not (within and kept), False]
    told = summary([CASE], [judged])
    assert (told["within"], told["kept"], told["right"]) == (within, kept, within and kept)
    assert told["frames_kept"] == (4 if kept else 3)
    assert told["within_by_frame"] == [[1, 1], [1, 1], [int(within), 1], [1, 1]]


def test_measuring_draws_alike_cases_together_and_keeps_their_order() -> None:
    asked: list[tuple[int, int]] = []

    def paint(texts: list[str], shown: list[list[Picture]], frames: int, seed: int) -> list[list[Picture]]:
        asked.append((len(texts), frames))
        return [[render(CLIP.scene)] * frames for _ in texts]

    found = measure("clip", paint, 6, 7)
    assert sorted(frames for _, frames in asked) == sorted({frames for _, frames in asked})
    assert sum(count for count, _ in asked) == found["total"] == len(found["pictures"]) == 6
    assert [f"{len(drawn)} frames" for drawn in found["pictures"]] == [
        case.kind for rng in [Random(7)] for case in [CASES["clip"](rng) for _ in range(6)]
    ]
    assert found["right"] < 6
    assert len(found["faults"]) == 6 - found["right"]


class Perfect:
    """In the pipeline's place: draws what the held-out requests of a kind want, but every other one's last frame is
    its first."""

    def __init__(self, name: str, seed: int) -> None:
        self.rng, self.name, self.asked = Random(seed), name, 0

    def run(self, terms: list[object], frames: int, seed: int, **settings: object) -> SimpleNamespace:
        case = CASES[self.name](self.rng)
        assert [isinstance(term, str) for term in terms] == [False] * len(case.shown) + [True]
        assert (terms[-1], frames) == (case.text, case.frames)
        assert settings == {"num_timesteps": 7} | ({} if case.shown else {"height": 128, "width": 128})
        scenes = list(case.expected(read_picture(render(Scene((), "white")))))
        self.asked += 1
        if self.asked % 2 == 0:
            scenes[-1] = scenes[0]
        return SimpleNamespace(images=[Image.fromarray(render(scene)) for scene in scenes])


def judged(name: str, pipe: Any, count: int) -> evaluate.Tally:
    return evaluate.TASKS[name](pipe, range(count), 11, {"num_timesteps": 7})


@pytest.mark.parametrize("name", ["future", "clip"])
def test_the_pipelines_frames_are_tallied(name: str) -> None:
    tally = judged(name, Perfect(name, 11 + 3), 4)
    assert (tally.total, tally.right) == (4, 2)
    assert tally.marks["within"] <= 4
    assert min(tally.marks["within"], tally.marks["kept"]) >= 2
    assert name == "clip" or len(tally.pictures) == 4 * clips.NEXT
    assert [fault["text"][:2] for fault in tally.faults] == ["1:", "3:"]


def test_the_same_requests_are_judged_with_less_guidance_and_without() -> None:
    asked: list[dict[str, object]] = []

    class Noted(Perfect):
        def run(self, terms: list[object], frames: int, seed: int, **settings: object) -> SimpleNamespace:
            asked.append({name: settings.pop(name) for name in [*settings] if name.startswith("cfg_")})
            return super().run(terms, frames, seed, **settings)

    guided, without, light = (
        judged(name, Noted("future", 11 + 3), 2) for name in ("future", "future-unguided", "future-light")
    )
    assert asked == [{}] * 2 + [{"cfg_text_scale": scale, "cfg_img_scale": scale} for scale in (1.0, 1.0, 1.5, 1.5)]
    assert (guided.faults, guided.marks) == (without.faults, without.marks) == (light.faults, light.marks)


def test_how_many_frames_are_judged_is_named_by_task() -> None:
    assert accuracy._counts("future=200, view=3") == {"future": 200, "view": 3}
    for wrong in ("dance=3", "future", "future=-1"):
        with pytest.raises(typer.BadParameter, match="future, clip, view, views, future-unguided, future-light"):
            accuracy._counts(wrong)
