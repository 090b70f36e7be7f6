"""Scenes and sentences of the demo checkpoint: valid, reproducible, held out where they must be."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from random import Random

import numpy as np
import pytest
from lowmem_bagel.benchmarks.demo import scenes, sentences
from lowmem_bagel.benchmarks.demo.scenes import CANVASES, COLOURS, SHAPES, Item, Scene


def some_scenes(count: int = 120, seed: int = 0) -> list[Scene]:
    rng = Random(seed)
    return [scenes.random_scene(rng, CANVASES[i % 3]) for i in range(count)]


def test_importable_without_torch() -> None:
    code = (
        "import sys\n"
        "from lowmem_bagel.benchmarks.demo import classifier, scenes, sentences\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_in_ten_combinations_is_held_out_and_training_has_none() -> None:
    everything = [(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if b != c]
    held = [k for k in everything if scenes.is_held_out(*k)]
    assert 0.07 < len(held) / len(everything) < 0.13
    # No colour and no shape may be missing from training altogether.
    for shape in SHAPES:
        for colour in COLOURS:
            assert any(not scenes.is_held_out(shape, colour, b) for b in COLOURS if b != colour)
    rng = Random(3)
    for canvas in CANVASES:
        for _ in range(60):
            scene = scenes.training_scene(rng, canvas)
            assert not any(scenes.is_held_out(*i.kind, scene.background) for i in scene.items)
            target = scenes.training_edit(rng, scene).target
            assert not any(scenes.is_held_out(*i.kind, target.background) for i in target.items)
            held_out = scenes.held_out_scene(rng, canvas)
            assert any(scenes.is_held_out(*i.kind, held_out.background) for i in held_out.items)


def test_shapes_lie_inside_and_apart_and_contrast_with_the_background() -> None:
    for scene in some_scenes(300):
        whole = np.zeros((scene.height, scene.width), int)
        for item in scene.items:
            assert item.radius >= 15
            assert item.colour != scene.background
            for shape in SHAPES:  # an edit may put any shape there
                mask = scenes.item_mask(Item(shape, "red", item.size, item.x, item.y, item.radius), *whole.shape)
                assert not mask[[0, -1]].any()
                assert not mask[:, [0, -1]].any()
            whole += scenes.item_mask(item, *whole.shape)
        assert whole.max() == 1


def test_shapes_have_the_area_of_their_disc() -> None:
    for shape in SHAPES:
        item = Item(shape, "red", "large", 640.2, 660.7, 300)
        mask = scenes.item_mask(item, 1280, 1280)
        assert mask.sum() == pytest.approx(math.pi * item.radius**2, rel=0.003)
        ys, xs = np.nonzero(mask)
        assert abs(xs.mean() + 0.5 - item.x) < 0.5
        assert abs(ys.mean() + 0.5 - item.y) < 0.5


def test_render_paints_inside_and_outside_in_the_plain_colours() -> None:
    item = Item("square", "red", "medium", 40, 50, 20)
    picture = scenes.render(Scene((item,), "blue"))
    mask = scenes.item_mask(item, 128, 128)
    ys, xs = scenes.pixel_centres(128, 128)
    off_the_edge = abs(scenes.signed_distance(np, "square", xs - item.x, ys - item.y, item.radius)) > 0.5
    assert (picture[mask & off_the_edge] == COLOURS["red"]).all()
    assert (picture[~mask & off_the_edge] == COLOURS["blue"]).all()


def test_two_shapes_have_one_relation_and_its_opposite_from_the_other_side() -> None:
    for scene in some_scenes(300):
        if len(scene.items) == 2:
            a, b = scene.items
            turned = Scene((b, a), scene.background, scene.height, scene.width)
            opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
            assert opposite[scene.relation()] == turned.relation()


def test_edits_change_what_they_say_and_nothing_else() -> None:
    rng = Random(5)
    kinds = Counter()
    for scene in some_scenes(400):
        edit = scenes.random_edit(rng, scene)
        kinds[edit.kind] += 1
        target = edit.target
        assert target != scene
        assert (target.height, target.width) == (scene.height, scene.width)
        if edit.kind == "background":
            assert target.items == scene.items
            assert target.background == edit.word
            assert edit.word not in {i.colour for i in scene.items}
            continue
        assert target.background == scene.background
        if edit.kind == "remove":
            assert edit.item not in target.items
            assert set(target.items) == set(scene.items) - {edit.item}
            continue
        changed = [(a, b) for a, b in zip(scene.items, target.items, strict=True) if a != b]
        assert len(changed) == (len(scene.items) if scene.is_group else 1)
        for before, after in changed:
            assert (before.x, before.y, before.radius) == (after.x, after.y, after.radius)
            assert (after.colour if edit.kind == "recolour" else after.shape) == edit.word
            assert after.colour != scene.background
    assert set(kinds) == set(scenes.EDIT_KINDS)


def test_captions_name_every_shape_and_hold_what_they_claim() -> None:
    rng = Random(6)
    for scene in some_scenes(300):
        said = sentences.caption(rng, scene)
        words = said.text.lower()
        for item in scene.items:
            assert f"{item.colour} {item.shape}" in words
        assert said.names_background == (scene.background in words.replace(",", " ").split("on")[-1]
                                         or f"{scene.background} background" in words)  # fmt: skip
        assert not said.names_relation or len(scene.items) == 2
        for wrong in (" a orange", " an red", "  "):
            assert wrong not in f" {words}"


def test_lists_are_in_reading_order() -> None:
    rng = Random(8)
    for scene in some_scenes(300):
        said = sentences.caption(rng, scene)
        if said.names_relation or scene.is_group:
            continue
        places = [said.text.lower().index(f"{i.colour} {i.shape}") for i in sentences.in_reading_order(scene)]
        assert places == sorted(places)


def test_questions_agree_with_the_scene() -> None:
    rng = Random(7)
    seen = Counter()
    for scene in some_scenes(600):
        asked = sentences.question(rng, scene)
        seen[asked.kind] += 1
        answer = asked.answer
        words = asked.text.rstrip("?").lower().split()
        if asked.kind == "background":
            assert answer == scene.background
        elif asked.kind == "count":
            shape = next((s for s in SHAPES if f"{s}s" in words), None)
            number = len([i for i in scene.items if shape in (None, i.shape)])
            assert answer == {0: "none", 1: "one", 2: "two", 3: "three"}[number]
        elif asked.kind == "exists":
            shape, colour = words[-1], words[-2] if words[-2] in COLOURS else None
            there = any(i.shape == shape and colour in (None, i.colour) for i in scene.items)
            assert answer == ("yes" if there else "no")
        elif asked.kind == "colour":
            shape = words[-1].rstrip("s")
            assert {i.colour for i in scene.items if i.shape == shape} == {answer}
        elif asked.kind == "shape":
            assert [i.shape for i in scene.items if i.colour == words[-1]] == [answer]
        elif asked.kind == "describe":
            assert all(f"{i.colour} {i.shape}" in answer for i in scene.items)
    assert set(seen) == set(sentences.QUESTION_KINDS)


def test_sentences_are_the_same_for_the_same_seed() -> None:
    def said(seed: int) -> list[str]:
        rng = Random(seed)
        return [sentences.caption(rng, scenes.random_scene(rng)).text for _ in range(20)]

    assert said(1) == said(1)
    assert said(1) != said(2)
