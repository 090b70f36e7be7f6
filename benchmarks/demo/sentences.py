"""Words for scenes: captions to draw from, instructions to edit by, questions with their answers.

Every sentence is drawn in several wordings, so that the model answers to more than one phrase per thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from .scenes import COLOURS, DIRECTIONS, SHAPES, Edit, Item, Scene, direction

NUMBERS = {0: "no", 1: "one", 2: "two", 3: "three"}
PHRASES = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}
RELATED = 0.8
"""Share of the captions of two shapes that say where they lie; the others list them, like all of three."""
TRAINED_RELATED = 0.5
"""The same in training: lists are harder to draw."""
_STARTS = ("a picture of", "an image of", "draw", "paint", "show me", "a drawing of")


@dataclass(frozen=True)
class Caption:
    """A sentence to draw, and what of the scene it fixes."""

    text: str
    scene: Scene
    names_background: bool
    names_relation: bool


def article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def noun(item: Item, sized: bool) -> str:
    return f"{item.size} {item.colour} {item.shape}" if sized else f"{item.colour} {item.shape}"


def listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def finished(rng: Random, text: str) -> str:
    """Sometimes a capital letter, sometimes a full stop."""
    if rng.random() < 0.35:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.4 else text


def caption(rng: Random, scene: Scene, related: float = RELATED) -> Caption:
    """A sentence for a scene of 1 to 3 shapes; of two, a share of `related` says where they lie."""
    items = in_reading_order(scene)
    relation = False
    if scene.is_group:
        text = f"{NUMBERS[len(items)]} {items[0].colour} {items[0].shape}s"
    else:
        relation = len(items) == 2 and rng.random() < related
        if relation:
            rng.shuffle(items)
        names = [article(noun(item, rng.random() < 0.3)) for item in items]
        if relation:
            where = direction(items[0].x - items[1].x, items[0].y - items[1].y)
            text = f"{names[0]} {rng.choice(PHRASES[where])} {names[1]}"
        else:
            text = listed(names)
    named = rng.random() < 0.92
    if named:
        b = scene.background
        text += rng.choices((f" on {article(b)} background", f" on {b}", f", {b} background"), (80, 12, 8))[0]
    if rng.random() < 0.35:
        text = f"{rng.choice(_STARTS)} {text}"
    return Caption(finished(rng, text), scene, named, relation)


def in_reading_order(scene: Scene) -> list[Item]:
    """From left to right, or two that lie above each other from above.

    Lists name shapes in this order. Named in any order, nothing would tell two shapes that are being drawn which of
    them is which, and both turn into the same one.
    """
    if len(scene.items) == 2 and scene.relation() in ("above", "below"):
        return sorted(scene.items, key=lambda i: i.y)
    return sorted(scene.items, key=lambda i: i.x)


def description(scene: Scene) -> str:
    """The one sentence that the model gives when asked to describe: from left to right, or from above."""
    items = in_reading_order(scene)
    if scene.is_group:
        text = f"{NUMBERS[len(items)]} {items[0].colour} {items[0].shape}s"
    else:
        names = [article(noun(item, False)) for item in items]
        if len(items) == 2:
            where = direction(items[0].x - items[1].x, items[0].y - items[1].y)
            text = f"{names[0]} {PHRASES[where][0]} {names[1]}"
        else:
            text = listed(names)
    text += f" on {article(scene.background)} background."
    return text[0].upper() + text[1:]


def _reference(rng: Random, scene: Scene, item: Item) -> str:
    """Words that mean this item and no other of the scene."""
    shape_alone = sum(i.shape == item.shape for i in scene.items) == 1
    colour_alone = sum(i.colour == item.colour for i in scene.items) == 1
    if shape_alone and rng.random() < 0.65:
        return f"the {item.shape}"
    if colour_alone and rng.random() < 0.15:
        return f"the {item.colour} shape"
    return f"the {item.colour} {item.shape}"


def instruction(rng: Random, edit: Edit) -> str:
    """An order that means this edit and no other."""
    word = edit.word
    if edit.kind == "background":
        return finished(rng, rng.choice((
            f"make the background {word}", f"change the background to {word}", f"turn the background {word}",
            f"paint the background {word}", f"use {article(word)} background",
        )))  # fmt: skip
    if edit.item is None:
        whom, plural = f"the {edit.source.items[0].shape}s", True
    else:
        whom, plural = _reference(rng, edit.source, edit.item), False
    if edit.kind == "remove":
        return finished(rng, f"{rng.choice(('remove', 'delete', 'take away', 'erase'))} {whom}")
    if edit.kind == "recolour":
        return finished(rng, rng.choice((
            f"make {whom} {word}", f"change {whom} to {word}", f"paint {whom} {word}", f"turn {whom} {word}",
            f"change the color of {whom} to {word}", f"change the colour of {whom} to {word}",
        )))  # fmt: skip
    new = f"{word}s" if plural else article(word)
    return finished(rng, rng.choice((
        f"turn {whom} into {new}", f"replace {whom} with {new}", f"change {whom} into {new}", f"make {whom} {new}",
    )))  # fmt: skip


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


QUESTION_KINDS = {
    "colour": 20, "shape": 12, "background": 12, "count": 12, "exists": 14, "relation": 10, "where": 8, "size": 6,
    "describe": 18,
}  # fmt: skip
"""Kinds of question and how often they are drawn where the scene allows them."""


def question(rng: Random, scene: Scene) -> Question:
    """A question about a scene of 0 to 3 shapes, with its only answer."""
    while True:
        kind = rng.choices(list(QUESTION_KINDS), list(QUESTION_KINDS.values()))[0]
        made = _question(rng, scene, kind)
        if made is not None:
            text = made[0]
            if rng.random() < 0.2:
                text = text[0].lower() + text[1:]
            return Question(kind, text, made[1])


def _question(rng: Random, scene: Scene, kind: str) -> tuple[str, str] | None:
    colour = rng.choice(("color", "colour"))
    if kind == "background":
        return rng.choice((f"What {colour} is the background?", f"Which {colour} is the background?")), scene.background
    if kind == "describe":
        asked = ("Describe the picture.", "Describe the image.", "What is in the picture?", "What do you see?",
                 "Describe this picture.")  # fmt: skip
        return (rng.choice(asked), description(scene)) if scene.items else None
    if kind == "count":
        shape = rng.choice(SHAPES)
        if rng.random() < 0.55:
            text = rng.choice(("How many shapes are there?", "How many shapes are in the picture?"))
            return text, NUMBERS[len(scene.items)] if scene.items else "none"
        number = sum(i.shape == shape for i in scene.items)
        return f"How many {shape}s are there?", NUMBERS[number] if number else "none"
    if kind == "exists":
        return _exists(rng, scene)
    if not scene.items:
        return None
    item = rng.choice(scene.items)
    if kind == "colour":
        if scene.is_group:
            return f"What {colour} are the {item.shape}s?", item.colour
        if sum(i.shape == item.shape for i in scene.items) > 1:
            return None
        return rng.choice((f"What {colour} is the {item.shape}?", f"Which {colour} is the {item.shape}?")), item.colour
    if scene.is_group:
        return None
    if kind == "shape":
        if sum(i.colour == item.colour for i in scene.items) > 1:
            return None
        return rng.choice((f"What shape is {item.colour}?", f"Which shape is {item.colour}?")), item.shape
    if kind == "size":
        return f"How big is {_reference(rng, scene, item)}?", item.size
    if len(scene.items) != 2:
        return None
    a, b = rng.sample(scene.items, 2)
    where = direction(a.x - b.x, a.y - b.y)
    if kind == "where":
        return f"Where is {_reference(rng, scene, a)}?", f"{PHRASES[where][0]} the {b.colour} {b.shape}"
    assert kind == "relation", kind
    asked_where = where if rng.random() < 0.5 else rng.choice([d for d in DIRECTIONS if d != where])
    text = f"Is {_reference(rng, scene, a)} {rng.choice(PHRASES[asked_where][:2])} {_reference(rng, scene, b)}?"
    return text, "yes" if asked_where == where else "no"


def _exists(rng: Random, scene: Scene) -> tuple[str, str] | None:
    kinds = {i.kind for i in scene.items}
    if scene.items and rng.random() < 0.5:
        shape, colour = rng.choice(sorted(kinds))
    elif scene.items and rng.random() < 0.7:  # near misses teach more than strangers
        shape, colour = rng.choice(sorted(kinds))
        if rng.random() < 0.5:
            shape = rng.choice(SHAPES)
        else:
            colour = rng.choice(list(COLOURS))
    else:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    if rng.random() < 0.3:
        return f"Is there {article(shape)}?", "yes" if any(s == shape for s, _ in kinds) else "no"
    return f"Is there {article(colour)} {shape}?", "yes" if (shape, colour) in kinds else "no"


def request(rng: Random, scene: Scene) -> tuple[Caption, Question, str]:
    """An order to draw a scene and to answer about the picture then: its two parts, and the sentence.

    The answer to it is `description`, then the picture, then the question's answer. So the caption tells all that the
    description does.
    """
    while True:
        said = caption(rng, scene)
        related = said.names_relation or scene.is_group or len(scene.items) != 2
        if said.names_background and related:
            asked = question(rng, scene)
            return said, asked, f"{said.text.rstrip('.')}. {asked.text}"
