"""`lowmem-bagel future`, `views` and `navigate`: recipes over frames."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..settings import Option, picture_options
from ..timeline import Timeline
from .console import ClipOption, JsonOption, ModelOption, check_output, load_flags, typed
from .options import Values, takes
from .pictures import OutOption, draw, show_result

TextsOption = Annotated[
    Path | None, typer.Option("--texts", help="JSON file of texts in place of the recipe's own; see docs/frames.md.")
]
FpsOption = Annotated[float, typer.Option("--fps", help="Frames a second of the animation.", min=0.1, max=120)]
PictureArgument = Annotated[Path, typer.Argument(metavar="PICTURE", help="Picture to begin from.")]
COUNT = 4
"""Frames of a future, where nothing else is said."""


def _options(*own: str) -> tuple[Option, ...]:
    """Settings of an edit but those that the recipe says itself."""
    return tuple(option for option in picture_options(editing=True) if option.name not in own)


@takes(settings=_options, loading=load_flags)
def future_command(
    clip: Annotated[Path, typer.Argument(metavar="CLIP", help="Video, folder of pictures, or one picture.")],
    settings: Values,
    loading: Values,
    prompt: Annotated[str, typer.Argument(help="What happens next; without it the clip decides.")] = "",
    model: ModelOption = None,
    out: OutOption = Path("future.png"),
    clip_count: ClipOption = 8,
    texts: TextsOption = None,
    fps: FpsOption = 8.0,
    as_json: JsonOption = False,
) -> None:
    """Draw the frames that come after a clip: 4, or --frames."""
    from ..pictures.clips import Clip, pictures_of
    from ..recipes import future, read_texts

    out, timeline, prompt = check_output(out, prompt), Timeline(), typed(prompt)
    said, count = read_texts(texts), settings.get("frames", COUNT)
    pictures = pictures_of(clip, clip_count)
    board = future(Clip(pictures, len(pictures)), count, prompt, settings.get("frame_mode", "together"), said)
    show_result(draw(board, model, settings, loading, timeline), out, as_json, timeline, fps, "future")


@takes(settings=lambda: _options("frames"), loading=load_flags)
def views_command(
    picture: PictureArgument,
    directions: Annotated[list[str], typer.Argument(metavar="DIRECTION...", help='Such as "from the left".')],
    settings: Values,
    loading: Values,
    model: ModelOption = None,
    out: OutOption = Path("views.png"),
    texts: TextsOption = None,
    fps: FpsOption = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Show a picture's scene from other directions, a frame each."""
    from ..pictures.opening import open_picture
    from ..recipes import read_texts, views

    out, timeline, said = check_output(out), Timeline(), read_texts(texts)
    board = views(
        open_picture(picture), [typed(text) for text in directions], settings.get("frame_mode", "together"), said
    )
    show_result(draw(board, model, settings, loading, timeline), out, as_json, timeline, fps, "views")


@takes(settings=lambda: _options("frames", "frame_mode", "frame_delta"), loading=load_flags)
def navigate_command(
    picture: PictureArgument,
    moves: Annotated[list[str], typer.Argument(metavar="MOVE...", help='Such as "forward" or "turn left".')],
    settings: Values,
    loading: Values,
    model: ModelOption = None,
    out: OutOption = Path("walk.png"),
    texts: TextsOption = None,
    fps: FpsOption = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Walk through a picture: a frame for each move."""
    from ..pictures.opening import open_picture
    from ..recipes import navigate, read_texts

    out, timeline, said = check_output(out), Timeline(), read_texts(texts)
    board = navigate(open_picture(picture), [typed(text) for text in moves], said)
    show_result(draw(board, model, settings, loading, timeline), out, as_json, timeline, fps, "navigate")
