"""The classifier that judges the demo checkpoint: right on true renders, and not to be fooled by wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from lowmem_bagel.benchmarks.demo import classifier
from lowmem_bagel.benchmarks.demo.classifier import components, judge_drawing, judge_edit, read_picture
from lowmem_bagel.benchmarks.demo.scenes import (
    CANVASES,
    COLOURS,
    SHAPES,
    Item,
    Scene,
    item_mask,
    random_edit,
    random_scene,
    render,
)
from lowmem_bagel.benchmarks.demo.sentences import Caption, caption
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Degrade = Callable[[NDArray[np.float32], np.random.Generator], NDArray[np.float32]]

PAIR = Scene((Item("circle", "red", "medium", 35, 64, 20), Item("square", "blue", "medium", 92, 60, 20)), "white")
SAID = Caption("a red circle to the left of a blue square on a white background", PAIR, True, True)


def moved(scene: Scene, number: int, **change: object) -> Scene:
    items = tuple(replace(item, **change) if i == number else item for i, item in enumerate(scene.items))  # type: ignore[arg-type]
    return replace(scene, items=items)


def test_true_renders_are_right() -> None:
    rng = Random(1)
    for number in range(60):
        scene = random_scene(rng, CANVASES[number % 3])
        assert judge_drawing(render(scene), caption(rng, scene)) == []
        target = random_edit(rng, scene).target
        assert judge_edit(render(target), target) == []


@pytest.mark.parametrize(
    "degrade",
    [
        lambda p, rng: p + rng.normal(0, 6, p.shape),
        lambda p, rng: p * 0.95 + 6,
        lambda p, rng: (p + np.roll(p, 1, 0) + np.roll(p, 1, 1) + np.roll(p, (1, 1), (0, 1))) / 4,
    ],
    ids=["noise", "contrast", "blur"],
)
def test_slightly_degraded_renders_are_right(degrade: Degrade) -> None:
    rng, noise = Random(2), np.random.default_rng(0)
    for _ in range(12):
        scene = random_scene(rng)
        picture = np.clip(degrade(render(scene).astype(np.float32), noise), 0, 255).astype(np.uint8)
        assert judge_edit(picture, scene) == []
        assert judge_drawing(picture, caption(rng, scene)) == []


@pytest.mark.parametrize(
    "wrong",
    [
        moved(PAIR, 0, colour="green"),
        moved(PAIR, 0, colour="orange"),
        moved(PAIR, 1, shape="diamond"),
        moved(PAIR, 1, shape="circle"),
        replace(PAIR, background="yellow"),
        replace(PAIR, items=PAIR.items[:1]),
        replace(PAIR, items=(*PAIR.items, Item("circle", "red", "small", 64, 105, 15))),
        replace(PAIR, items=()),
        Scene((moved(PAIR, 0, x=92.0).items[0], moved(PAIR, 1, x=35.0).items[1]), "white"),
        Scene((moved(PAIR, 0, x=64.0, y=30.0).items[0], moved(PAIR, 1, x=64.0, y=95.0).items[1]), "white"),
    ],
    ids=["colour", "near colour", "shape", "near shape", "background", "missing", "extra", "empty", "swapped", "above"],
)
def test_another_scene_is_wrong(wrong: Scene) -> None:
    assert judge_drawing(render(wrong), SAID)
    assert judge_edit(render(wrong), PAIR)


def test_what_a_caption_leaves_open_may_differ() -> None:
    elsewhere = replace(moved(moved(PAIR, 0, y=40.0), 1, y=50.0, radius=16.0), background="black")
    assert judge_drawing(render(elsewhere), replace(SAID, names_background=False)) == []
    swapped = Scene((moved(PAIR, 0, x=92.0).items[0], moved(PAIR, 1, x=35.0).items[1]), "white")
    assert judge_drawing(render(swapped), replace(SAID, names_relation=False)) == []


@pytest.mark.parametrize("shift", [0, 3, 12, 20])
def test_an_edit_must_leave_shapes_in_their_place(shift: int) -> None:
    faults = judge_edit(render(moved(PAIR, 0, x=35.0 + shift)), PAIR)
    assert bool(faults) == (shift > 6)


def damaged(change: Callable[[Picture], None]) -> Picture:
    picture = render(PAIR)
    change(picture)
    return picture


def crescent(picture: Picture) -> None:
    picture[item_mask(Item("circle", "", "", 43, 64, 20), 128, 128)] = COLOURS["white"]


def two_colours(picture: Picture) -> None:
    picture[item_mask(PAIR.items[0], 128, 128) & (np.arange(128)[:, None] > 64)] = COLOURS["green"]


def melted(picture: Picture) -> None:
    picture[60:70, 50:75] = COLOURS["red"]


def speckle(picture: Picture) -> None:
    picture[8:14, 100:106] = COLOURS["black"]


def dirt(picture: Picture) -> None:
    spots = np.random.default_rng(3).random(picture.shape[:2]) < 0.05
    picture[spots & (picture == 245).all(-1)] = (120, 120, 120)


def bridge(picture: Picture) -> None:
    picture[58:66, 50:80] = COLOURS["blue"]


def outline(picture: Picture) -> None:
    picture[item_mask(Item("circle", "", "", 35, 64, 17), 128, 128)] = COLOURS["white"]


@pytest.mark.parametrize("change", [crescent, two_colours, melted, speckle, dirt, bridge, outline])
def test_a_damaged_picture_is_wrong(change: Callable[[Picture], None]) -> None:
    picture = damaged(change)
    assert judge_drawing(picture, SAID)
    assert judge_edit(picture, PAIR)


def test_noise_and_plain_pictures_are_wrong() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    plain = np.full((128, 128, 3), 245, np.uint8)
    for picture in (noise, plain):
        assert judge_drawing(picture, SAID)
        assert judge_edit(picture, PAIR)


def test_an_edit_of_another_size_is_wrong() -> None:
    assert judge_edit(render(replace(PAIR, height=96)), PAIR) == ["is 128x96, not 128x128"]


def test_reading_gives_place_and_shape() -> None:
    for shape in SHAPES:
        item = Item(shape, "purple", "large", 60.5, 66.0, 26)
        (region,) = read_picture(render(Scene((item,), "yellow"))).regions
        assert (region.shape, region.colour) == (shape, "purple")
        assert abs(region.x - item.x) < 0.5
        assert abs(region.y - item.y) < 0.5
        assert region.iou > 0.93


def test_components_are_the_connected_regions() -> None:
    mask = np.array([[1, 1, 0, 0, 1], [0, 1, 0, 1, 0], [0, 0, 0, 1, 1], [1, 0, 0, 0, 1]], bool)
    sizes = sorted(int(m.sum()) for m in components(mask))
    assert sizes == [1, 1, 3, 4]
    assert (np.sum(components(mask), axis=0) == mask).all()


def test_regions_grow_and_shrink_on_every_side() -> None:
    mask = np.zeros((5, 6), bool)
    mask[2, 3] = mask[0, 0] = True
    grown = classifier._grow(mask)
    assert grown.astype(int).tolist() == [
        [1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]
    ]  # fmt: skip
    assert (classifier._shrink(grown) == mask).all()
    assert classifier._shrink(np.ones((3, 3), bool)).all(), "what lies outside the picture is not in its way"
    assert components(np.zeros((3, 3), bool)) == []
