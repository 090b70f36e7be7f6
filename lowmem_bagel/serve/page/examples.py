"""Prompts to begin with: of what the embedded model knows, coloured shapes, and of what BAGEL knows."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from ...demo_checkpoint import FOLDER


class Examples(NamedTuple):
    """Prompts for drawing, editing, asking and talking."""

    draw: tuple[str, ...]
    edit: tuple[str, ...]
    ask: tuple[str, ...]
    chat: tuple[str, ...]


OF_SHAPES = Examples(
    (
        "a large red circle on a white background",
        "a blue square to the left of a yellow triangle on a black background",
        "a green diamond above a purple circle on a white background",
        "an orange triangle on a blue background",
    ),
    ("make the circle green", "remove the square", "make the background yellow"),
    ("What color is the circle?", "How many triangles are there?", "What shape is green?"),
    (
        "a small blue circle on a white background. What color is the circle?",
        "a red square above a green triangle on a black background. How many shapes are there?",
    ),
)
OF_EVERYTHING = Examples(
    (
        "a red fox in the snow, soft morning light",
        "a watercolor of a harbor at dusk, boats and lanterns",
        "a glass teapot on a wooden table, steam, product photograph",
        "一只橘猫坐在窗台上看雨，水彩画",
    ),
    ("make it night", "remove the person in the background", "turn it into a pencil drawing"),
    ("What animal is this?", "Describe the picture in detail.", "图里写了什么？"),
    ("Which way out of this maze? Draw the path, then say it.", "What would this room look like with the chairs gone?"),
)


def examples_for(path: Path) -> Examples:
    """Those that the model in a folder can do."""
    return OF_SHAPES if path.resolve() == FOLDER.resolve() else OF_EVERYTHING
