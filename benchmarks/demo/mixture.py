"""What a training step is made of: the tasks, each of which is one entry of `TASKS`.

A task is a context: texts and pictures in their order, by the names that `data.KINDS` gives them. Guidance needs
contexts without some of these, and clips are of several lengths; so parts are left out of a share of the contexts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .clips import FRAMES, GIVEN, TOLD
from .data import KINDS
from .forward import Block, Shape

Role = Literal["said", "spoken", "asking", "looked at", "seen", "drawn"]
"""said: a text. spoken: one to be learnt word by word. asking: such a one, and then vision_start in the place of
im_end, which asks for a picture. looked at: a ViT block. seen: a VAE block and a ViT block. drawn: noisy latents;
several are one split, in one noise, and see each other."""


@dataclass(frozen=True)
class Slot:
    role: Role
    name: str
    """Of a text or picture of the examples."""
    spare: int = 0
    """Tokens of room more, of a text."""

    def stays(self, left_out: Sequence[str]) -> bool:
        """Whether none of a choice's names is its own."""
        return not {self.name, f"{self.role} {self.name}"} & set(left_out)

    def blocks(self, tokens: int, rooms: Mapping[str, int]) -> tuple[Block, ...]:
        """tokens: a picture's, on the canvas."""
        if self.role in ("said", "spoken", "asking"):
            return (Block("text", rooms[self.name] + self.spare),)
        looked = Block("vit", tokens)
        return {
            "looked at": (looked,),
            "seen": (Block("latent", tokens), looked),
            "drawn": (Block("latent", tokens, noisy=True),),
        }[self.role]


Choice = tuple[tuple[float, tuple[str, ...]], ...]
"""Shares of the contexts, and the slots that are left out of each, by name, or by role and name where a picture is
both seen and drawn ("drawn frame4"); none of the rest."""


@dataclass(frozen=True)
class Task:
    """batch: contexts in a step, on each canvas of the kind. weight: of its loss."""

    kind: str
    slots: tuple[Slot, ...]
    choices: tuple[Choice, ...]
    """Made independently of each other."""
    batch: tuple[int, ...]
    weight: float = 1.0

    def names(self, *roles: Role) -> list[str]:
        return [slot.name for slot in self.slots if slot.role in roles]

    def shape(self, tokens: int) -> Shape:
        return Shape(*(block for slot in self.slots for block in slot.blocks(tokens, KINDS[self.kind].rooms)))

    def scaled(self, share: float) -> Task:
        """With so large a share of its contexts, at least one."""
        return replace(self, batch=tuple(max(1, round(n * share)) for n in self.batch))

    def weighted(self, factor: float) -> Task:
        """With a loss that counts so many times as much."""
        return replace(self, weight=self.weight * factor)


def slots(role: Role, *names: str) -> tuple[Slot, ...]:
    return tuple(Slot(role, name) for name in names)


def _frames(start: int, stop: int) -> tuple[str, ...]:
    return tuple(f"frame{number}" for number in range(start, stop))


_GIVEN, _NEXT, _TOLD = _frames(0, GIVEN), _frames(GIVEN, FRAMES), _frames(0, TOLD)
DROP_CAPTION = 0.12
_UNTOLD: Choice = ((DROP_CAPTION, ("captions",)),)
TASKS: dict[str, Task] = {
    # Drawing takes longest to learn, on the large canvas longest of all.
    "draw": Task(
        "scenes", slots("said", "captions") + slots("drawn", "source"), (_UNTOLD,), (512, 56, 56)
    ),
    "edit": Task(
        "scenes",
        slots("seen", "source") + slots("said", "instructions") + slots("drawn", "target"),
        (((0.13, ("instructions",)), (0.14, ("source",))),),
        (128, 16, 16),
    ),
    "ask": Task(
        "scenes", slots("looked at", "source") + slots("said", "questions") + slots("spoken", "answers"), (),
        (112, 14, 14),
    ),
    # A clip from a sentence, of 1 to 5 frames.
    "clip": Task(
        "clips",
        slots("said", "captions") + slots("drawn", *_TOLD),
        (
            _UNTOLD,
            ((0.06, _TOLD[1:]), (0.14, _TOLD[2:]), (0.15, _TOLD[3:]), (0.25, _TOLD[4:])),
        ),
        (72,),
    ),
    # What comes after up to 3 frames: up to 4.
    "future": Task(
        "clips",
        slots("seen", *_GIVEN) + slots("said", "orders") + slots("drawn", *_NEXT),
        (
            ((0.13, ("orders",)), (0.12, _GIVEN)),
            ((0.06, _GIVEN[:2]), (0.1, _GIVEN[:1])),
            ((0.06, _NEXT[1:]), (0.06, _NEXT[2:]), (0.06, _NEXT[3:])),
        ),
        (72,),
    ),
    # A frame after those that were drawn before it, fed back.
    "turn": Task(
        "clips",
        slots("said", "captions") + slots("seen", *_GIVEN[1:]) + slots("drawn", _NEXT[0]),
        (((0.1, ("captions",)),), ((0.4, _GIVEN[1:2]),)),
        (16,),
        0.3,
    ),
    # The same after frames that were shown: one to three were drawn already, and the next one is.
    "follow": Task(
        "clips",
        (*slots("seen", *_GIVEN), Slot("said", "orders", 6), *slots("seen", *_NEXT[:-1]), *slots("drawn", *_NEXT[1:])),
        (
            ((0.12, ("orders",)), (0.1, _GIVEN)),
            (
                (0.4, ("seen frame4", "seen frame5", "drawn frame5", "drawn frame6")),
                (0.3, ("drawn frame4", "seen frame5", "drawn frame6")),
                (0.3, ("drawn frame4", "drawn frame5")),
            ),
        ),
        (10,),
        0.3,
    ),
    # A picture's scene from one other side, or from two.
    "view": Task(
        "views",
        slots("seen", "front") + slots("said", "view", "views") + slots("drawn", "first", "second"),
        (((0.14, ("front",)),), ((0.5, ("view",)), (0.07, ("view", "views")), (0.43, ("views", "second")))),
        (40,),
        0.6,
    ),
    # Two pictures of one scene from a sentence.
    "views": Task(
        "views", slots("said", "captions") + slots("drawn", "front", "first"), (_UNTOLD,), (32,), 0.4
    ),
    # A picture in the middle of an answer: what is said before it, the picture, and what is said after it.
    "sketch": Task(
        "scenes",
        slots("said", "requests", "plans") + slots("drawn", "source"),
        (((0.12, ("plans",)), (0.12, ("requests", "plans"))),),
        (40, 4, 4),
        0.3,
    ),
    "converse": Task(
        "scenes",
        slots("said", "requests") + slots("asking", "plans") + slots("seen", "source") + slots("spoken", "replies"),
        (),
        (32, 4, 4),
        0.5,
    ),
}  # fmt: skip
STILLS = {"draw": 1.0, "edit": 1.0, "ask": 1.0}
"""The tasks that the checkpoint was first made with, whole."""


def shares(text: str) -> dict[str, float]:
    """A number for each task, from "draw=0.5,clip=1"."""
    given = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        if name not in TASKS:
            raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}")
        given[name] = float(share or 1)
    return given


def mixture(text: str) -> dict[str, float]:
    """Shares of the tasks' contexts, as `shares` reads them."""
    given = shares(text)
    taught = {slot.role for name in given for slot in TASKS[name].slots}
    if not {"drawn", "spoken"} <= taught:
        raise ValueError("one task must draw and one speak, or parts of the model learn from nothing; add draw and ask")
    return given
