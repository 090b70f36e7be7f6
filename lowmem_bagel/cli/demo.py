"""`lowmem-bagel demo`: draw, edit and ask on the embedded checkpoint, and a contact sheet of it all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import check_place, load_flags, load_pipeline, notes_shown
from .options import Values, takes
from .terminal import note, say

if TYPE_CHECKING:
    from PIL import Image

    from ..checkpoint.folder import ModelFolder

DRAWINGS = (
    "a large red circle on a white background",
    "a blue square to the left of a yellow triangle on a black background",
    "a green diamond above a purple circle on a white background",
    "an orange triangle on a blue background",
)
EDITS = ((0, "make the circle green"), (1, "remove the square"), (3, "make the background yellow"))
QUESTIONS = ((0, "What color is the circle?"), (1, "How many triangles are there?"), (2, "What shape is green?"))
SHEET = "contact-sheet.png"
SEED = 1
SCALE = 2


@takes(loading=load_flags)
def demo_command(
    loading: Values,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("lowmem-bagel-demo"),
    num_timesteps: Annotated[int, typer.Option(help="Timesteps a picture.")] = 30,
) -> None:
    """Draw, edit and ask with the embedded model, on any machine."""
    from ..errors import OutputError
    from ..files import expanded
    from ..pictures.saving import save_picture
    from ..settings import picture_settings

    out = expanded(out)
    check_place(_nearest_folder(out) / SHEET)
    captioned: list[tuple[str, Image.Image]] = []

    def check(folder: ModelFolder) -> None:
        picture_settings(folder.config, folder.max_side, False, {"num_timesteps": num_timesteps}, note)

    with notes_shown():
        pipe = load_pipeline(None, loading, check)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot make the folder {out} ({error.strerror}); choose another place with -o"
            raise OutputError(message) from error
        drawn = []
        for number, prompt in enumerate(DRAWINGS):
            result = pipe.generate(prompt, seed=SEED + number, num_timesteps=num_timesteps)
            assert result.image is not None
            drawn.append(result.image)
            path = result.save(out / f"draw-{number + 1}.png")
            captioned.append((prompt, result.image))
            say(f"draw  {prompt!r} -> {path} ({result.stats.seconds:.1f} s)")
        for number, (source, prompt) in enumerate(EDITS):
            result = pipe.edit(drawn[source], prompt, seed=SEED + number, num_timesteps=num_timesteps)
            assert result.image is not None
            path = result.save(out / f"edit-{number + 1}.png")
            captioned.append((f"picture {source + 1}: {prompt}", result.image))
            say(f"edit  draw-{source + 1}.png, {prompt!r} -> {path} ({result.stats.seconds:.1f} s)")
        for source, question in QUESTIONS:
            result = pipe.ask(question, drawn[source])
            captioned.append((f"{question} {result.text}", drawn[source]))
            say(f"ask   draw-{source + 1}.png, {question!r} -> {result.text}")
    sheet = save_picture(contact_sheet(captioned), out / SHEET, {"captions": [text for text, _ in captioned]})
    say(f"contact sheet: {sheet}")


def _nearest_folder(path: Path) -> Path:
    """The folder itself, or the one above it in which it would be made."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))


def contact_sheet(captioned: list[tuple[str, Image.Image]], columns: int = 4) -> Image.Image:
    """All pictures on one sheet, each with its caption below."""
    from PIL import Image, ImageDraw

    width = max(image.width for _, image in captioned) * SCALE
    height = max(image.height for _, image in captioned) * SCALE
    caption, margin = 40, 12
    rows = -(-len(captioned) // columns)
    cell_width, cell_height = width + margin, height + caption + margin
    sheet = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (text, image) in enumerate(captioned):
        x = margin + number % columns * cell_width
        y = margin + number // columns * cell_height
        sheet.paste(image.resize((image.width * SCALE, image.height * SCALE), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + height + 4), _wrap(text, width // 6), fill="black")
    return sheet


def _wrap(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:3])
