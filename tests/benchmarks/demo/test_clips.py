"""Clips and views of the demo checkpoint: rules kept, shapes in place, held out what training must not show."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from lowmem_bagel.benchmarks.demo import clips
from lowmem_bagel.benchmarks.demo.scenes import SHAPES, Item, Scene, apart, item_mask, random_scene, render

ONE = Scene((Item("triangle", "red", "small", 60, 70, 15.7),), "white")


def test_importable_without_torch() -> None:
    code = (
        "import sys\n"
        "from lowmem_bagel.benchmarks.demo import clip_cases, clips\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_shapes_stay_inside_apart_and_visible() -> None:
    rng = Random(1)
    two = 0
    for _ in range(60):
        clip = clips.random_clip(rng)
        two += len(clip.scene.items) == 2
        for number in range(clips.FRAMES):
            shown = clip.frame(number)
            assert len({item.colour for item in shown.items} | {shown.background}) == len(shown.items) + 1
            assert len(shown.items) == 1 or apart(*shown.items)
            for item in shown.items:
                mask = item_mask(item, clips.SIDE, clips.SIDE)
                assert mask.sum() > 600
                assert not (mask[[0, -1]].any() or mask[:, [0, -1]].any())
    assert 8 < two < 40


def test_rules_are_kept_from_frame_to_frame() -> None:
    moving = clips.Clip(ONE, (clips.Motion("up and to the left", "fast"),))
    places = [(f.items[0].x, f.items[0].y) for f in map(moving.frame, range(4))]
    for number, (x, y) in enumerate(places):
        assert (x, y) == pytest.approx((60 - number * 8 * 0.5**0.5, 70 - number * 8 * 0.5**0.5))
    turning = clips.Clip(ONE, (clips.Motion(turn="clockwise"),))
    assert [turning.frame(n).items[0].angle for n in range(5)] == [0, 30, 60, 90, 0]
    back = clips.Clip(ONE, (clips.Motion(turn="counterclockwise"),))
    assert [back.frame(n).items[0].angle for n in range(4)] == [0, 90, 60, 30]
    changing = clips.Clip(ONE, (clips.Motion(colours=("red", "blue", "green")),))
    assert [changing.frame(n).items[0].colour for n in range(5)] == ["red", "blue", "green", "red", "blue"]


def test_a_shape_turned_clockwise_is_the_picture_turned_clockwise() -> None:
    middle = replace(ONE, items=(replace(ONE.items[0], x=64, y=64),))
    turned = replace(middle, items=(replace(middle.items[0], angle=90),))
    assert abs(render(turned).astype(int) - np.rot90(render(middle), -1)).max() <= 1
    assert abs(render(turned).astype(int) - render(middle)).max() > 100


def test_training_shows_nothing_held_out_but_every_shape_and_direction() -> None:
    rng = Random(2)
    trained = [clips.training_clip(rng) for _ in range(600)]
    assert not any(clip.held_out for clip in trained)
    assert {clip.motions[0].direction for clip in trained} == {"", *clips.DIRECTIONS}
    assert {clip.scene.items[0].shape for clip in trained} == set(SHAPES)
    held = [clips.Motion(d, s).held_out(shape) for d in clips.DIRECTIONS for s in clips.SPEEDS for shape in SHAPES]
    assert 0.05 < sum(held) / len(held) < 0.2
    assert all(clips.held_out_clip(rng).held_out for _ in range(20))
    assert not any(clips.training_view(rng)[0].held_out for _ in range(100))


def test_a_shape_that_becomes_held_out_on_its_way_is_held_out() -> None:
    for clip in (clips.random_clip(Random(seed)) for seed in range(400)):
        if clip.motions[0].colours and any(clip.frame(n).held_out for n in range(1, 3)) and not clip.scene.held_out:
            assert clip.held_out
            return
    raise AssertionError("no such clip")


def test_views_are_the_picture_turned_and_mirrored() -> None:
    for seed in range(12):
        scene = random_scene(Random(seed), (128, 128))
        picture = render(scene).astype(int)
        for view, quarters in (("right", -1), ("behind", 2), ("left", 1)):
            assert abs(render(clips.seen_from(scene, view)) - np.rot90(picture, quarters)).max() <= 1
        assert abs(render(clips.seen_from(scene, "mirror")) - picture[:, ::-1]).max() <= 1
    assert set(clips.VIEWS) == {"right", "behind", "left", "mirror"}


def test_sentences_tell_the_rule() -> None:
    rng = Random(3)
    for _ in range(80):
        clip = clips.random_clip(rng)
        motion, told = clip.motions[0], (clips.clip_caption(rng, clip), clips.order_to_continue(rng, clip, True))
        for text in told:
            words = [clip.scene.items[0].shape, motion.direction, motion.speed, motion.turn, *motion.colours]
            assert all(word in text for word in words), (text, words)
        assert clips.order_to_continue(rng, clip, False) in clips.NEXT_FRAMES
    scene = random_scene(rng, (128, 128))
    assert all(clips.VIEWS[view] in clips.order_to_view(rng, ("left", "mirror")) for view in ("left", "mirror"))
    said, text = clips.views_caption(rng, scene, "behind")
    assert text == f"{said.text.rstrip('.')}, from the front and from behind"
