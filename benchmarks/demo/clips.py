"""Clips and views that the demo checkpoint is taught: scenes whose shapes move, turn and change color by rule, and
scenes seen from several sides; sentences for them, and which of them training never shows.

A clip is a scene and a rule for each of its shapes; every frame is a scene. Importing this needs no torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random

from .scenes import (
    COLOURS,
    HELD_OUT_ONE_IN,
    REACH_UP,
    SHAPES,
    SIZE_JITTER,
    SIZES,
    Item,
    Scene,
    apart,
    random_scene,
)
from .sentences import Caption, article, caption, finished, listed, noun

SIDE = 128
"""Pixels of a frame's sides."""
GIVEN, NEXT = 3, 4
"""Frames that are shown, and those to be drawn after them."""
FRAMES = GIVEN + NEXT
TOLD = 5
"""Frames at most that are drawn from a sentence alone."""
TURN, ANGLES = 30.0, {"triangle": (0.0, 30.0, 60.0, 90.0)}
"""Degrees that a turning shape turns from frame to frame, and those that a triangle can be turned by: at 120 it looks
as at 0. Only triangles turn: a circle looks the same, and a square would become a diamond."""
SPEEDS = {"slowly": 4.0, "fast": 8.0}
"""Pixels from frame to frame."""
_DIAGONAL = 0.5**0.5
DIRECTIONS: dict[str, tuple[float, float]] = {
    "to the left": (-1, 0),
    "to the right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and to the left": (-_DIAGONAL, -_DIAGONAL),
    "up and to the right": (_DIAGONAL, -_DIAGONAL),
    "down and to the left": (-_DIAGONAL, _DIAGONAL),
    "down and to the right": (_DIAGONAL, _DIAGONAL),
}
TURNS = {"clockwise": TURN, "counterclockwise": -TURN}
RULES: dict[tuple[str, ...], int] = {
    ("move",): 45, ("turn",): 12, ("change",): 13, ("move", "turn"): 12, ("move", "change"): 18,
}  # fmt: skip
"""What a clip's first shape does, and in how many of a hundred; the second one stays as it is."""
SECOND = 0.35
"""Share of clips with a second shape."""
VIEWS = {"right": "from the right", "behind": "from behind", "left": "from the left", "mirror": "in a mirror"}
"""The pictures are plans, seen from above by somebody who stands below their lower edge. Who walks around them sees
them turned: from the right a quarter clockwise, so that what lay on the left lies at the top."""
_QUARTERS = {"right": 1, "behind": 2, "left": 3}


@dataclass(frozen=True)
class Motion:
    """What a shape does from frame to frame; keys of `DIRECTIONS`, `SPEEDS` and `TURNS`, empty where it does not."""

    direction: str = ""
    speed: str = ""
    turn: str = ""
    colours: tuple[str, ...] = ()
    """That it has one after the other, and again; of none it keeps its own."""

    @property
    def step(self) -> tuple[float, float]:
        """Pixels to the right and down from frame to frame."""
        if not self.direction:
            return 0.0, 0.0
        x, y = DIRECTIONS[self.direction]
        return x * SPEEDS[self.speed], y * SPEEDS[self.speed]

    def after(self, item: Item, frames: int) -> Item:
        """The shape so many frames later."""
        dx, dy = self.step
        colour = self.colours[frames % len(self.colours)] if self.colours else item.colour
        angle = _alike(item.shape, item.angle + frames * TURNS.get(self.turn, 0.0))
        return replace(item, x=item.x + frames * dx, y=item.y + frames * dy, colour=colour, angle=angle)

    def held_out(self, shape: str) -> bool:
        """Whether training never shows a shape of this kind moving so: one in ten, by hash."""
        if not self.direction:
            return False
        return zlib.crc32(f"{shape} {self.speed} {self.direction}".encode()) % HELD_OUT_ONE_IN == 3


STAYS = Motion()


def _alike(shape: str, angle: float) -> float:
    """The smallest angle at which a shape looks the same; only multiples of `TURN`, or of 90, come up."""
    return angle % 120 if shape in ANGLES else 0.0


@dataclass(frozen=True)
class Clip:
    """`scene` is frame 0; a motion for each of its shapes."""

    scene: Scene
    motions: tuple[Motion, ...]

    def frame(self, number: int) -> Scene:
        items = zip(self.scene.items, self.motions, strict=True)
        return replace(self.scene, items=tuple(motion.after(item, number) for item, motion in items))

    @property
    def held_out(self) -> bool:
        """Whether training shows no clip of such a shape and background, or none of a shape that moves so."""
        motions = zip(self.scene.items, self.motions, strict=True)
        return any(motion.held_out(item.shape) for item, motion in motions) or any(
            self.frame(number).held_out for number in range(FRAMES)
        )


def random_clip(rng: Random) -> Clip:
    """One shape that does something, or two of which the second stays: inside the picture, apart from each other and
    of other colors than each other and the background, in all `FRAMES`."""
    does = rng.choices(list(RULES), list(RULES.values()))[0]
    background, *colours = rng.sample(list(COLOURS), 5)
    motion = _motion(rng, does, colours[: rng.choice((2, 3))])
    shapes = ["triangle" if motion.turn else rng.choice(SHAPES), rng.choice(SHAPES)][: 1 + (rng.random() < SECOND)]
    while True:
        first, *others = (
            _placed(rng, shape, colour, moving)
            for shape, colour, moving in zip(shapes, (colours[0], colours[3]), (motion, STAYS), strict=False)
        )
        clip = Clip(Scene((first, *others), background, SIDE, SIDE), (motion, STAYS)[: len(shapes)])
        if all(apart(motion.after(first, number), other) for other in others for number in range(FRAMES)):
            return clip


def training_clip(rng: Random) -> Clip:
    """A random clip without anything that is held out."""
    while (clip := random_clip(rng)).held_out:
        pass
    return clip


def held_out_clip(rng: Random) -> Clip:
    """A random clip with something that training never shows."""
    while not (clip := random_clip(rng)).held_out:
        pass
    return clip


def _motion(rng: Random, does: tuple[str, ...], colours: list[str]) -> Motion:
    motion = STAYS
    if "move" in does:
        motion = replace(motion, direction=rng.choice(list(DIRECTIONS)), speed=rng.choice(list(SPEEDS)))
    if "turn" in does:
        motion = replace(motion, turn=rng.choice(list(TURNS)))
    if "change" in does:
        motion = replace(motion, colours=tuple(colours))
    return motion


def _placed(rng: Random, shape: str, colour: str, motion: Motion) -> Item:
    """A shape somewhere where it stays inside the picture in all frames."""
    while True:
        size = rng.choice(list(SIZES))
        radius = SIZES[size] + rng.uniform(-SIZE_JITTER, SIZE_JITTER)
        room = REACH_UP * radius + 2
        ways = [step * (FRAMES - 1) for step in motion.step]
        starts = [(room + max(0.0, -way), SIDE - room - max(0.0, way)) for way in ways]
        if all(low <= high for low, high in starts):
            x, y = (round(rng.uniform(*start), 2) for start in starts)
            angle = rng.choice(ANGLES[shape]) if motion.turn else 0.0
            return Item(shape, colour, size, x, y, round(radius, 2), angle)


# Views ------------------------------------------------------------------------------------------------------------


def seen_from(scene: Scene, view: str) -> Scene:
    """The scene as the view (of `VIEWS`) shows it; scenes are square."""
    return replace(scene, items=tuple(_seen(item, view, scene.width) for item in scene.items))


def _seen(item: Item, view: str, side: int) -> Item:
    if view == "mirror":
        return replace(item, x=side - item.x, angle=_alike(item.shape, -item.angle))
    quarters, x, y = _QUARTERS[view], item.x, item.y
    for _ in range(quarters):
        x, y = side - y, x
    return replace(item, x=x, y=y, angle=_alike(item.shape, item.angle + 90 * quarters))


# Sentences --------------------------------------------------------------------------------------------------------


def clip_caption(rng: Random, clip: Clip) -> str:
    """A sentence that tells a clip from its beginning."""
    first, motion = clip.scene.items[0], clip.motions[0]
    who = first.shape if motion.colours else noun(first, rng.random() < 0.3)
    said = f"{article(who)} {_does(rng, motion)}"
    for item in clip.scene.items[1:]:
        said += f", {article(noun(item, rng.random() < 0.2))} stays"
    said += f" on {article(clip.scene.background)} background" if rng.random() < 0.8 else f" on {clip.scene.background}"
    return finished(rng, f"a film of {said}" if rng.random() < 0.2 else said)


def _does(rng: Random, motion: Motion) -> str:
    """What a shape does, in words."""
    parts = []
    if motion.direction:
        pace = (motion.speed, motion.direction) if rng.random() < 0.7 else (motion.direction, motion.speed)
        parts.append(f"{rng.choice(('moves', 'goes'))} {' '.join(pace)}")
    if motion.turn:
        parts.append(f"turns {motion.turn}")
    if motion.colours:
        parts.append(f"changes between {listed(list(motion.colours))}")
    return " and ".join(parts)


NEXT_FRAMES = (
    "What happens next?", "the next frames", "Show what comes next.", "Continue.", "Draw the next frames.",
    "Draw the next frame.",
)  # fmt: skip
"""Orders that leave it to the frames how a clip goes on."""


def order_to_continue(rng: Random, clip: Clip, named: bool) -> str:
    """What is said after the first frames of a clip; `named`: it tells the rule that they show."""
    if not named:
        return rng.choice(NEXT_FRAMES)
    return finished(rng, f"the {clip.scene.items[0].shape} {_does(rng, clip.motions[0])}")


def order_to_view(rng: Random, views: Sequence[str]) -> str:
    """What is said to have a picture's scene seen from each of the views."""
    said = listed([VIEWS[view] for view in views])
    start = rng.choice(("seen", "show it", "the same", "show the same"))
    return finished(rng, f"{start} {said}" if rng.random() < 0.75 else said)


def views_caption(rng: Random, scene: Scene, view: str) -> tuple[Caption, str]:
    """A caption of a scene, and with it a sentence for two pictures: from the front and from somewhere else."""
    said = caption(rng, scene)
    return said, f"{said.text.rstrip('.')}, from the front and {VIEWS[view]}"


def view_pairs() -> list[tuple[str, str]]:
    """Two views that differ."""
    return [(a, b) for a, b in product(VIEWS, VIEWS) if a != b]


def training_view(rng: Random) -> tuple[Scene, tuple[str, str]]:
    """A scene without held-out combinations, and two views of it."""
    while (scene := random_scene(rng, (SIDE, SIDE))).held_out:
        pass
    return scene, rng.choice(view_pairs())
