"""What the demo checkpoint is taught: scenes of coloured shapes, and which of them it never sees in training.

A scene is data; `render` turns it into pixels. Distances and coverage are written once for NumPy and for PyTorch
arrays (`draw.py` renders batches on a GPU with them), so this module needs no torch.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle", "diamond")
CROSS = "cross"
"""A shape that the checkpoint is never shown: what an adapter teaches it."""
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (35, 155, 60),
    "blue": (40, 80, 225),
    "yellow": (250, 220, 50),
    "purple": (140, 45, 185),
    "orange": (250, 140, 25),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SIZES: dict[str, float] = {"small": 15.7, "medium": 20.5, "large": 26.3}
"""Radius in pixels of the disc with the shape's area; a scene's own radii lie within `SIZE_JITTER` of it."""
SIZE_JITTER = 0.7
CANVASES = ((128, 128), (96, 128), (128, 96))
"""(height, width) of the pictures."""
DIRECTIONS = ("left", "right", "above", "below")
HELD_OUT_ONE_IN = 10
COUNT_SHARES = (48, 44, 8)
"""Percent of scenes with 1, 2 and 3 shapes, where the checkpoint is measured."""
TRAINED_COUNT_SHARES = (30, 48, 22)
"""The same in training: one shape is learnt soonest, so fewer examples of it do."""
GAP = 4.0
"""Pixels left free between two shapes."""
_SIZE_SETS: dict[int, list[tuple[str, ...]]] = {
    1: [("small",), ("medium",), ("large",)],
    2: [("small", "small"), ("small", "medium"), ("medium", "medium"), ("small", "large")],
    3: [("small", "small", "small")],
}
"""Sizes that fit beside each other on every canvas."""

# Relative to the radius, so that all shapes have the disc's area: half the side of the square, half the diagonal of
# the diamond, the inradius of the triangle.
_SQUARE = math.sqrt(math.pi) / 2
_DIAMOND = math.sqrt(math.pi / 2)
_TRIANGLE = math.sqrt(math.pi / (3 * math.sqrt(3)))
_ARM = 1.108
"""Length of the arms of a cross."""
_ARM_WIDTH = _ARM - math.sqrt(_ARM**2 - math.pi / 4)
"""Half of it; the area 8 w l - 4 w^2 is the disc's."""
REACH = _TRIANGLE * math.sqrt(3)
"""Half the width of the widest shape (the triangle), relative to the radius."""
REACH_UP = 2 * _TRIANGLE
"""From the centre to the triangle's tip. Every shape is given the room of every other, so that an edit may swap
them in place."""


@dataclass(frozen=True)
class Item:
    """One shape: centre of mass (x, y) and radius in pixels, `size` the word for the radius, turned clockwise by
    `angle` degrees."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float = 0.0

    @property
    def kind(self) -> tuple[str, str]:
        return self.shape, self.colour


@dataclass(frozen=True)
class Scene:
    items: tuple[Item, ...]
    background: str
    height: int = 128
    width: int = 128

    @property
    def is_group(self) -> bool:
        """Several equal shapes, spoken of together ("two red circles")."""
        return len(self.items) > 1 and len({item.kind for item in self.items}) == 1

    @property
    def held_out(self) -> bool:
        """Whether a (shape, colour, background) is in it that training never shows."""
        return any(is_held_out(*item.kind, self.background) for item in self.items)

    def relation(self) -> str:
        """Where the first of two items lies, seen from the second."""
        a, b = self.items
        return direction(a.x - b.x, a.y - b.y)


def direction(dx: float, dy: float) -> str:
    """The word for an offset in pixels (y downwards): the longer axis decides."""
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def is_held_out(shape: str, colour: str, background: str) -> bool:
    """One in ten combinations, chosen by hash so that no list has to be kept."""
    return zlib.crc32(f"{shape} {colour} {background}".encode()) % HELD_OUT_ONE_IN == 3


def random_scene(rng: Random, canvas: tuple[int, int] = CANVASES[0], count: int | None = None) -> Scene:
    """A scene of 1, 2 or 3 shapes that do not touch; some of those with several are groups of equal shapes."""
    height, width = canvas
    count = count or random_count(rng)
    group = count > 1 and rng.random() < 0.15
    background = rng.choice(list(COLOURS))
    colours = [c for c in COLOURS if c != background]
    while True:
        kinds = [(rng.choice(SHAPES), rng.choice(colours)) for _ in range(count)]
        if group:
            return Scene(_formation(rng, kinds[0], count, height, width), background, height, width)
        if len(set(kinds)) < count:
            continue
        sizes = rng.choice(_SIZE_SETS[count])
        items = _place(rng, kinds, rng.sample(sizes, count), height, width)
        if items is not None:
            return Scene(items, background, height, width)


def random_count(rng: Random, shares: tuple[int, ...] = COUNT_SHARES) -> int:
    """How many shapes a scene has, from 1."""
    return rng.choices(range(1, len(shares) + 1), shares)[0]


def training_scene(rng: Random, canvas: tuple[int, int] = CANVASES[0]) -> Scene:
    """A random scene without a held-out combination."""
    while (scene := random_scene(rng, canvas, random_count(rng, TRAINED_COUNT_SHARES))).held_out:
        pass
    return scene


def held_out_scene(rng: Random, canvas: tuple[int, int] = CANVASES[0]) -> Scene:
    """A random scene with a held-out combination: no picture like it was trained on.

    The number of shapes is drawn first: otherwise scenes of three would be three times as frequent as `COUNT_SHARES`.
    """
    count = random_count(rng)
    while not (scene := random_scene(rng, canvas, count)).held_out:
        pass
    return scene


def _formation(rng: Random, kind: tuple[str, str], count: int, height: int, width: int) -> tuple[Item, ...]:
    """Equal small shapes: two in a row, three in a triangle. A fixed formation makes the number plain."""
    xs, ys = ((0.26, 0.74), (0.5, 0.5)) if count == 2 else ((0.5, 0.26, 0.74), (0.29, 0.74, 0.74))
    down = rng.uniform(-0.1, 0.1) * height if count == 2 else 0.0
    radius = round(SIZES["small"] + rng.uniform(-SIZE_JITTER, SIZE_JITTER / 2), 2)
    return tuple(
        Item(*kind, "small", round(x * width + rng.uniform(-1, 1), 2), round(y * height + down, 2), radius)
        for x, y in zip(xs, ys, strict=True)
    )


def _place(
    rng: Random, kinds: list[tuple[str, str]], sizes: list[str], height: int, width: int
) -> tuple[Item, ...] | None:
    """Positions at random, or None where these sizes seem not to fit."""
    for _ in range(12):
        items: list[Item] = []
        for (shape, colour), size in zip(kinds, sizes, strict=True):
            r = SIZES[size] + rng.uniform(-SIZE_JITTER, SIZE_JITTER)
            x = rng.uniform(REACH * r + 2, width - REACH * r - 2)
            y = rng.uniform(REACH_UP * r + 2, height - _DIAMOND * r - 2)
            item = Item(shape, colour, size, round(x, 2), round(y, 2), round(r, 2))
            if not all(apart(item, other) for other in items):
                break
            items.append(item)
        if len(items) == len(kinds) and _unambiguous(items):
            return tuple(items)
    return None


def apart(a: Item, b: Item) -> bool:
    return math.hypot(a.x - b.x, a.y - b.y) >= REACH * (a.radius + b.radius) + GAP


def _unambiguous(items: list[Item]) -> bool:
    """Two: clearly beside or above each other. Three: with a clear order from left to right."""
    if len(items) == 2:
        dx, dy = abs(items[0].x - items[1].x), abs(items[0].y - items[1].y)
        return max(dx, dy) >= 1.5 * min(dx, dy)
    xs = sorted(item.x for item in items)
    return all(b - a >= 8 for a, b in pairwise(xs))


def signed_distance(xp: Any, shape: str, dx: Any, dy: Any, radius: Any) -> Any:
    """Distance in pixels to the outline, negative inside; in front of a corner the nearest edge line's.

    `xp` is numpy or torch, `dx`, `dy` (offsets from the centre of mass, y downwards) and `radius` its arrays.
    """
    if shape == "circle":
        return xp.sqrt(dx * dx + dy * dy) - radius
    if shape == "square":
        return xp.maximum(abs(dx), abs(dy)) - _SQUARE * radius
    if shape == "diamond":
        return (abs(dx) + abs(dy) - _DIAMOND * radius) * math.sqrt(0.5)
    if shape == CROSS:
        long, short = xp.maximum(abs(dx), abs(dy)), xp.minimum(abs(dx), abs(dy))
        return xp.maximum(long - _ARM * radius, short - _ARM_WIDTH * radius)
    assert shape == "triangle", shape
    return xp.maximum(dy, abs(dx) * math.sqrt(0.75) - dy * 0.5) - _TRIANGLE * radius


def turned_back(dx: Any, dy: Any, cosine: Any, sine: Any) -> tuple[Any, Any]:
    """Offsets from the centre of a shape that is turned clockwise by an angle, as the unturned shape has them."""
    return dx * cosine + dy * sine, dy * cosine - dx * sine


def _distance(item: Item, height: int, width: int) -> NDArray[np.float32]:
    """`signed_distance` of every pixel's centre: float32 [height, width]."""
    ys, xs = pixel_centres(height, width)
    dx, dy = xs - np.float32(item.x), ys - np.float32(item.y)
    if item.angle:
        angle = math.radians(item.angle)
        dx, dy = turned_back(dx, dy, np.float32(math.cos(angle)), np.float32(math.sin(angle)))
    return np.asarray(signed_distance(np, item.shape, dx, dy, np.float32(item.radius)))


def item_mask(item: Item, height: int, width: int) -> NDArray[np.bool_]:
    """The pixels whose centre lies inside the shape: bool [height, width]."""
    return np.asarray(_distance(item, height, width) < 0)


def pixel_centres(height: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """y as [height, 1] and x as [1, width]."""
    ys = np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5)
    return ys, np.arange(width, dtype=np.float32)[None] + np.float32(0.5)


def render(scene: Scene) -> NDArray[np.uint8]:
    """The picture, uint8 [height, width, 3], with edges antialiased over one pixel."""
    picture = np.empty((scene.height, scene.width, 3), np.float32)
    picture[:] = COLOURS[scene.background]
    for item in scene.items:
        cover = np.clip(0.5 - _distance(item, scene.height, scene.width), 0, 1)[..., None]
        picture += cover * (np.asarray(COLOURS[item.colour], np.float32) - picture)
    return np.round(picture).astype(np.uint8)


# Edits -------------------------------------------------------------------------------------------------------------

EDIT_KINDS = {"recolour": 40, "remove": 20, "background": 20, "reshape": 20}
"""Kinds of edit and their share in percent."""


@dataclass(frozen=True)
class Edit:
    """`target` is what `source` must become. `item` is the shape meant (None: the background, or the whole group)."""

    kind: str
    source: Scene
    target: Scene
    item: Item | None
    word: str
    """The new colour or shape; empty for a removal."""


def random_edit(rng: Random, scene: Scene) -> Edit:
    """An edit of a scene whose target is a valid scene too, held-out combinations not excluded."""
    while True:
        kind = rng.choices(list(EDIT_KINDS), list(EDIT_KINDS.values()))[0]
        edit = _try_edit(rng, scene, kind)
        if edit is not None:
            return edit


def training_edit(rng: Random, scene: Scene) -> Edit:
    """An edit whose target holds no held-out combination."""
    while True:
        edit = random_edit(rng, scene)
        if not edit.target.held_out:
            return edit


def _try_edit(rng: Random, scene: Scene, kind: str) -> Edit | None:
    if kind == "background":
        taken = {item.colour for item in scene.items} | {scene.background}
        word = rng.choice([c for c in COLOURS if c not in taken])
        return Edit(kind, scene, replace(scene, background=word), None, word)
    chosen = rng.randrange(len(scene.items))
    item = scene.items[chosen]
    if kind == "remove":
        if scene.is_group:
            return None
        rest = scene.items[:chosen] + scene.items[chosen + 1 :]
        return Edit(kind, scene, replace(scene, items=rest), item, "")
    if kind == "recolour":
        word = rng.choice([c for c in COLOURS if c not in (item.colour, scene.background)])
        change = {"colour": word}
    else:
        word = rng.choice([s for s in SHAPES if s != item.shape])
        change = {"shape": word}
    if scene.is_group:
        items = tuple(replace(i, **change) for i in scene.items)  # type: ignore[arg-type]
        return Edit(kind, scene, replace(scene, items=items), None, word)
    items = tuple(replace(i, **change) if i is item else i for i in scene.items)  # type: ignore[arg-type]
    if max(Counter(i.kind for i in items).values()) > 1:
        return None
    return Edit(kind, scene, replace(scene, items=items), item, word)
