"""What variants are compared on: scenes of the demo checkpoint's kind, or a folder of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from lowmem_bagel.errors import SettingError

if TYPE_CHECKING:
    from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg")
QUESTION = "Describe the picture."
MAX_TEXT = 1 << 20
"""Bytes of a file of prompts."""
LAYOUT = "it holds *.txt files with one prompt a line, and pictures (PNG, JPEG)"


@dataclass(frozen=True)
class Request:
    """A text, and the picture that it is about where there is one."""

    text: str
    picture: Image.Image | None = None

    @property
    def terms(self) -> list[Any]:
        return [self.text] if self.picture is None else [self.picture, self.text]


@dataclass(frozen=True)
class Material:
    """Pictures to draw or to edit in this order, texts to read, and questions to answer. `about`: for the record."""

    about: dict[str, Any]
    drawings: tuple[Request, ...]
    texts: tuple[str, ...]
    questions: tuple[Request, ...]

    def bounded(self, pictures: int, texts: int) -> Material:
        """The first of each."""
        kept = self.drawings[:pictures], self.texts[:texts], self.questions[:texts]
        counts = dict(zip(("pictures", "texts", "questions"), map(len, kept), strict=True))
        return Material({**self.about, **counts}, *kept)


def built_in(seed: int, count: int) -> Material:
    """Captions, edits and questions of scenes that the demo checkpoint was not trained on, `count` of each."""
    from PIL import Image

    from ...demo.scenes import held_out_scene, random_edit, render
    from ...demo.sentences import caption, instruction, question

    rng = Random(seed)
    captions = [caption(rng, held_out_scene(rng)).text for _ in range(count)]
    edits, questions = [], []
    for _ in range(count):
        edit = random_edit(rng, held_out_scene(rng))
        edits.append(Request(instruction(rng, edit), Image.fromarray(render(edit.source))))
        scene = held_out_scene(rng)
        questions.append(Request(question(rng, scene).text, Image.fromarray(render(scene))))
    drawings = _in_turn([Request(text) for text in captions], edits)
    return Material({"name": "scenes of coloured shapes", "seed": seed}, drawings, tuple(captions), tuple(questions))


def read_material(folder: Path) -> Material:
    """The user's own: every line of a *.txt is a prompt to draw, every picture is described, and a text file with a
    picture's name (fox.png, fox.txt) holds instructions to edit that picture instead.

    Raises:
        SettingError: no such folder, nothing in it, or a text that cannot be read.
        ImageError: a picture that cannot be used.
    """
    from lowmem_bagel.pictures.opening import open_picture

    if not folder.is_dir():
        raise SettingError(f"no such folder: {folder}; --material names a folder, and {LAYOUT}")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    pictures = {path.stem: open_picture(path).image for path in files if path.suffix.lower() in PICTURES}
    prompts: list[Request] = []
    edits: list[Request] = []
    for path in files:
        if path.suffix.lower() == ".txt":
            picture = pictures.get(path.stem)
            (prompts if picture is None else edits).extend(Request(line, picture) for line in _lines(path))
    if not prompts and not pictures:
        raise SettingError(f"{folder} has no prompts and no pictures; {LAYOUT}")
    questions = [Request(QUESTION, picture) for picture in pictures.values()]
    about = {
        "name": folder.name,
        "layout": "prompts by line; pictures described, edited by the lines of their own text",
    }
    texts = tuple(request.text for request in chain(prompts, edits))
    return Material(about, _in_turn(prompts, edits), texts, tuple(questions))


def _in_turn(drawn: list[Request], edited: list[Request]) -> tuple[Request, ...]:
    pairs: Iterator[Request | None] = chain.from_iterable(zip_longest(drawn, edited))
    return tuple(request for request in pairs if request is not None)


def _lines(path: Path) -> list[str]:
    from lowmem_bagel.settings import check_prompt

    if path.stat().st_size > MAX_TEXT:
        raise SettingError(f"{path} is larger than {MAX_TEXT} bytes; give fewer prompts")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"cannot read {path} as UTF-8 text ({type(error).__name__}); save it as UTF-8") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        check_prompt(line)
    return lines
