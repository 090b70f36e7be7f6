"""Recipes over frames: each makes what a pipeline is asked for, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import SettingError
from ..pictures.clips import Clip
from ..settings import FrameMode, check_prompt
from .texts import Texts, own_texts

if TYPE_CHECKING:
    from ..generation.results import Result
    from ..pictures.callers import PictureSource
    from ..pipeline import BagelPipeline


@dataclass(frozen=True)
class Storyboard:
    """What is asked for: the terms of a request, texts of the frames after the first, and settings."""

    terms: Sequence[Any]
    turns: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, pipe: BagelPipeline, **settings: Any) -> Result:
        """The frames. Settings and callback as of `BagelPipeline.run`; they win over the recipe's own.

        Raises:
            UserError: as of `BagelPipeline.run`.
        """
        return pipe.run(list(self.terms), turns=self.turns, **{**self.settings, **settings})


def future(
    clip: Clip, count: int, prompt: str = "", mode: FrameMode = "together", texts: Texts | None = None
) -> Storyboard:
    """The `count` frames that come after a clip.

    Args:
        prompt: what happens in them; without it the clip decides.
        mode: drawn together, or each after the one before.

    Raises:
        UserError: the clip cannot be used.
    """
    said = (texts or own_texts())["future"]
    text = said["told"].format(prompt=prompt) if prompt.strip() else said[mode]
    return Storyboard([*clip.pictures(), text], settings={"frames": count, "frame_mode": mode})


def views(
    picture: PictureSource, directions: Sequence[str], mode: FrameMode = "together", texts: Texts | None = None
) -> Storyboard:
    """A picture's scene from other places, a frame for each direction, such as "from the left".

    Args:
        mode: drawn together, or one after the other, which sees those before.

    Raises:
        SettingError: there is no direction, or one says nothing.
    """
    said = (texts or own_texts())["views"]
    _check("direction", directions)
    if mode == "turn":
        first, *others = (said["turn"].format(view=direction) for direction in directions)
        return _in_turn(picture, first, others)
    text = said["together"].format(views=_listed(directions, said["and"]))
    return Storyboard([picture, text], settings={"frames": len(directions), "frame_mode": mode})


def navigate(picture: PictureSource, moves: Sequence[str], texts: Texts | None = None) -> Storyboard:
    """What is seen from a picture's place after each of some moves, such as "forward" and "turn left".

    Raises:
        SettingError: there is no move, or one says nothing.
    """
    said = (texts or own_texts())["navigate"]
    _check("move", moves)
    first, *others = (said["move"].format(move=move) for move in moves)
    return _in_turn(picture, first, others)


def _in_turn(picture: PictureSource, first: str, others: Sequence[str]) -> Storyboard:
    return Storyboard([picture, first], tuple(others), {"frames": 1 + len(others), "frame_mode": "turn"})


def _check(what: str, said: Sequence[str]) -> None:
    if isinstance(said, str) or not said:
        raise SettingError(f"give a list of at least one {what}")
    for text in said:
        check_prompt(text)


def _listed(parts: Sequence[str], last: str) -> str:
    """ "a", "a and b", "a, b and c"."""
    return last.join(filter(None, (", ".join(parts[:-1]), parts[-1])))
