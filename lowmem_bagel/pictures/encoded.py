"""A picture whose header is read and whose pixels are not, and the bounds that it is held to meanwhile."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from ..errors import ImageError
from .directory import exif_directory

if TYPE_CHECKING:
    from PIL import Image

MIN_SIDE = 2
MAX_PIXELS = 178_956_970
MEMORY = 850_000_000
"""Bytes that decoding one picture, and what is made of it, may take."""
MAX_FILE_BYTES = 1 << 29
MAX_BESIDE_BYTES = 16 << 20
"""Of a profile or a text that a file holds compressed."""

ORIENTATION = 0x0112
HELD_BYTES = {
    "RGB": 4, "1": 6, "L": 5, "P": 5, "I;16": 7, "I;16B": 7, "I;16L": 7, "I;16N": 7, "I": 9, "F": 9, "LA": 14, "La": 14,
    "PA": 12,
}  # fmt: skip
"""Bytes a pixel, by Pillow's mode, of a picture and of what is made of it on the way to RGB; others take 8."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """An open file that holds a picture, and what it is called in messages."""

    file: BinaryIO
    length: int
    name: str


@dataclass(frozen=True)
class Beside:
    """What a file says beside its pixels, as it stands there. `turned` is an orientation said outside of EXIF."""

    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    turned: int = 0

    @property
    def orientation(self) -> int:
        """1 to 8 as EXIF counts them; 1 where nothing sensible is said."""
        directory = exif_directory(self.exif)
        said = self.turned or (directory.number(ORIENTATION, 0) if directory is not None else 0)
        if not said and self.xmp:
            found = re.search(rb"tiff:Orientation(?:=\"|>)([0-9])", self.xmp)
            said = int(found[1]) if found else 0
        return said if 1 <= said <= 8 else 1


@dataclass(frozen=True)
class Encoded:
    """What a header says, and how the pixels are had.

    Attributes:
        size: width and height in pixels.
        bytes_a_pixel: that decoding takes at most.
        decode: the first picture's pixels, in one of Pillow's modes.
        white: which value of a grey deeper than 8 bits is white; None where the file does not say.
        notes: what was wrong beside the pixels.
    """

    size: tuple[int, int]
    bytes_a_pixel: float
    decode: Callable[[Note], Image.Image]
    beside: Beside = field(default_factory=Beside)
    white: float | None = None
    notes: tuple[str, ...] = ()


def reason_of(error: Exception) -> str:
    """What a decoder says, in one short line.

    Raises:
        NameError: the error itself, where it is one: that is a fault of ours.
    """
    if isinstance(error, NameError):
        raise error
    return " ".join(f"{error}".split())[:200] or type(error).__name__


def check_size(name: str, size: tuple[int, int], bytes_a_pixel: float) -> None:
    """Refuse a picture from its header alone.

    Raises:
        ImageError: a side is too short, or there are more pixels than may be decoded.
    """
    width, height = size
    most = min(MAX_PIXELS, int(MEMORY / bytes_a_pixel))
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} is {width}x{height} pixels: too small; use one of at least {MIN_SIDE} pixels a side")
    if width * height > most:
        raise ImageError(
            f"{name} is {width}x{height} pixels: too large; scale it down to {most // 10**6} megapixels or fewer"
        )


def bytes_of(mode: str) -> int:
    """Bytes a pixel of a picture in this mode and of the RGB picture that is made of it."""
    return HELD_BYTES.get(mode, 8)
