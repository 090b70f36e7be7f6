"""Depth and range: deep samples brought to 8 bits as a viewer shows them; what had to be assumed is noted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .encoded import Note

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL import Image

FULL = {"u1": 255.0, "u2": 65535.0}
"""White of the types whose whole range is meant."""
MODES = {5: "CMYK", 6: "YCbCr"}
"""Pillow's, by TIFF's photometric interpretation."""
USUAL_WHITES = (255, 4095, 65535, 2**24 - 1, 2**32 - 1)
"""Of whole numbers whose range is not said: the first that none of them exceeds."""
USUAL_FLOAT_WHITES = (1.0, 255.0, 65535.0)
CHUNK = 1 << 20
"""Values that are scaled at a time, so that no second copy of a large picture is made in floats."""


def scaled(values: ndarray, black: float, white: float) -> Image.Image:
    """Values [H, W] or [H, W, 3 or 4] as 8 bits, rounded and clipped; what is no number becomes black."""
    import numpy as np
    from PIL import Image

    flat = np.empty(values.shape, np.uint8)
    rows = max(1, CHUNK // max(1, values[0].size))
    with np.errstate(invalid="ignore"):  # of values that are no numbers
        for start in range(0, len(values), rows):
            part = values[start : start + rows].astype(np.float64)
            part -= black
            part *= 255.0 / (white - black)
            np.nan_to_num(part, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
            flat[start : start + rows] = np.clip(part, 0, 255, out=part).round(out=part)
    return Image.fromarray(flat)


def from_samples(
    colors: ndarray, alpha: ndarray | None, premultiplied: bool, photometric: int, words: str, note: Note
) -> Image.Image:
    """Samples [H, W, 1, 3 or 4] of whatever range, and alpha [H, W] of the same type, as an 8-bit picture.

    Args:
        photometric: as TIFF counts: 0 white is zero, 1 black is zero, 2 RGB, 5 inks, 6 luma and chroma.
        words: what the samples are, for the note.
    """
    from PIL import Image, ImageChops

    full = FULL.get(colors.dtype.str[1:])
    black, white = (0.0, full) if full else range_of(colors, words, note)
    picture = scaled(colors[..., 0] if colors.shape[2] == 1 else colors, black, white)
    if photometric in MODES:
        return Image.frombytes(MODES[photometric], picture.size, picture.tobytes())
    if photometric == 0:
        picture = ImageChops.invert(picture)
    if alpha is None:
        return picture
    opaque = scaled(alpha, 0.0, 1.0 if alpha.dtype.kind == "f" else float(white))
    whole = Image.merge(f"{picture.mode}A", (*picture.split(), opaque))
    return _divided(whole) if premultiplied else whole


def _divided(image: Image.Image) -> Image.Image:
    """Colors that alpha was multiplied into, divided by it again."""
    from PIL import Image

    straight = "RGBa" if image.mode == "RGBA" else "La"
    return Image.frombytes(straight, image.size, image.tobytes()).convert(image.mode)


def range_of(values: ndarray, words: str, note: Note) -> tuple[float, float]:
    """Which values are black and white, where no file says so: by what there is. It is noted."""
    low, high = _extremes(values)
    usual: tuple[Any, ...] = USUAL_FLOAT_WHITES if values.dtype.kind == "f" else USUAL_WHITES
    white = next((w for w in usual if high <= w), high)
    black = 0.0 if low >= 0 else low
    if low < 0:
        white = high if high > low else low + 1
    note(
        f"samples of {words} go from {low:g} to {high:g} and their range is not said; "
        f"black was taken to be {black:g} and white {white:g}"
    )
    return black, float(white)


def _extremes(values: ndarray) -> tuple[float, float]:
    """The least and the greatest of the values that are numbers; 0 and 1 where none is."""
    import numpy as np

    if values.dtype.kind != "f":
        return float(values.min()), float(values.max())
    numbers = np.isfinite(values)
    low = float(np.min(values, where=numbers, initial=np.inf))
    high = float(np.max(values, where=numbers, initial=-np.inf))
    return (low, high) if low <= high else (0.0, 1.0)


def is_deep(image: Image.Image) -> bool:
    """Whether it is a grey of more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def in_eight_bits(image: Image.Image, white: float | None, note: Note) -> Image.Image:
    """A deep grey as `L`, by the white that its file says, or else by what there is."""
    import numpy as np

    values = np.asarray(image)
    if white is None and values.dtype.kind == "u":
        white = 65535.0
    black, top = (0.0, white) if white is not None else range_of(values, _words(values), note)
    return scaled(values, black, top)


def _words(values: ndarray) -> str:
    return f"{values.dtype.itemsize * 8} bits ({'floats' if values.dtype.kind == 'f' else 'whole numbers'})"
