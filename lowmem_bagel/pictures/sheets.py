"""Several pictures of one size on one sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SHEET_GAP = 4
"""Pixels between the frames of a sheet that is saved."""


def sheet(images: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """All pictures, row by row, on a sheet that is as wide as it is high in pictures, or a little wider; the picture
    itself where there is one. `gap` is of white pixels between them."""
    from PIL import Image

    first = images[0]
    if len(images) == 1:
        return first
    columns = math.ceil(math.sqrt(len(images)))
    rows = -(-len(images) // columns)
    width, height = first.width + gap, first.height + gap
    whole = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for number, image in enumerate(images):
        whole.paste(image, (number % columns * width, number // columns * height))
    return whole
