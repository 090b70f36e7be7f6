"""Any picture a person has, as 8-bit RGB: what a viewer shows of it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import ImageError, MissingExtraError
from ..files import expanded, open_file
from .callers import Data, content_of, image_of, is_url, unread_file
from .color import to_srgb
from .depth import in_eight_bits, is_deep
from .encoded import MAX_FILE_BYTES, ORIENTATION, Beside, Encoded, Note, Source, bytes_of, check_size, reason_of
from .kinds import KINDS, read_header

if TYPE_CHECKING:
    from PIL import Image

    from .callers import PictureSource

PILLOWS_NAMES = {kind.name.upper().replace(" ", "") for kind in KINDS} | {"MPO", "DIB", "HEIF"}
"""Of the formats that are opened."""
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
         8: "ROTATE_90"}  # fmt: skip
"""What brings a picture upright, by its orientation in EXIF."""


@dataclass(frozen=True)
class Picture:
    """An opened picture, 8-bit RGB, and what ought to be known of how it was read."""

    image: Image.Image
    notes: tuple[str, ...] = ()


def open_picture(source: PictureSource | Picture, called: str | None = None) -> Picture:
    """A picture as 8-bit RGB: upright, in sRGB, alpha composited on white, deeper samples scaled down.

    Args:
        source: a path, a data: URL, bytes, a file object, a PIL image, an array (uint8 or floats from 0 to 1; HxW or
            HxWx3 or 4) or a tensor (the same, or CxHxW). What was opened before comes back as it is.
        called: what messages and notes call it, where it has no path.

    Raises:
        ImageError: it is missing, no picture, of a format that is not read, damaged, or of an impossible size.
        MissingExtraError: an optional package reads it.
    """
    if isinstance(source, Picture):
        return source
    notes: list[str] = []
    with _failures_named(source, called) as name:
        given = image_of(source, name)
        unread = source if given is None else unread_file(given)
        if unread is None:
            assert given is not None
            image = _pictured(_given(given, name), name, notes.append)
        else:
            with _content(unread, name) as content:
                image = _pictured(read_header(content), name, notes.append)
    return Picture(image, tuple(f"{os.path.basename(name)}: {note}" for note in notes))


@contextmanager
def opened(source: PictureSource) -> Iterator[Source]:
    """The file behind a path, or the content given, for as long as it is read.

    Raises:
        ImageError: it cannot be read; also where what is done with it fails.
    """
    with _failures_named(source) as name, _content(source, name) as content:
        yield content


@contextmanager
def _failures_named(source: PictureSource, called: str | None = None) -> Iterator[str]:
    """Whatever a decoder fails with becomes an ImageError that names the picture."""
    name = called or "the picture"
    try:
        if isinstance(source, (str, os.PathLike)) and not is_url(source):
            name = os.fsdecode(source)
        yield name
    except (ImageError, MissingExtraError):
        raise
    except MemoryError as error:
        raise ImageError(f"{name}: there is not enough memory to open it; scale it down") from error
    except Exception as error:  # decoders raise whatever they meet in damaged files
        raise ImageError(f"{name}: damaged or truncated picture ({reason_of(error)}); save it again") from error


@contextmanager
def _content(source: PictureSource, name: str) -> Iterator[Source]:
    """The file behind a path, or the content given, to be read from."""
    if isinstance(source, (str, os.PathLike)) and not is_url(source):
        with _file(expanded(os.fsdecode(source)), name) as file:
            length = os.fstat(file.fileno()).st_size
            if length > MAX_FILE_BYTES:
                raise ImageError(f"{name}: too large ({length} bytes); give one of {MAX_FILE_BYTES >> 20} MB or fewer")
            yield Source(file, length, name)
        return
    data: Data = content_of(source, name)
    yield Source(io.BytesIO(data), len(data), name)


def _file(path: Path, name: str) -> BinaryIO:
    try:
        return open_file(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageError(f"no such picture: {name}") from None
    except OSError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror}); give a picture file") from None


def _given(image: Image.Image, name: str) -> Encoded:
    """A picture that the caller has, opened by Pillow or made in memory."""
    if getattr(image, "tile", None) and image.format not in PILLOWS_NAMES:
        raise ImageError(f"{name}: {image.format} pictures are not read here; save it as PNG or JPEG")
    check_size(name, image.size, bytes_of(image.mode))
    image.load()
    icc = image.info.get("icc_profile")
    beside = Beside(icc if isinstance(icc, bytes) else None, turned=_turned(image))
    # A profile is applied in place, which is not to be seen by the caller.
    return Encoded(image.size, bytes_of(image.mode), lambda note: image.copy() if icc else image, beside)


def _turned(image: Image.Image) -> int:
    """The orientation that Pillow finds, or the one that can be read where it finds the EXIF block damaged."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever its parser meets there: the pixels are good
        exif = image.info.get("exif")
        return Beside(exif=exif if isinstance(exif, bytes) else None).orientation


def _pictured(encoded: Encoded, name: str, note: Note) -> Image.Image:
    from PIL import Image

    turn = TURNS.get(encoded.beside.orientation)
    check_size(name, encoded.size, encoded.bytes_a_pixel + (4 if turn else 0))
    for said in encoded.notes:
        note(said)
    image = encoded.decode(note)
    image.load()
    varied = _varied(image)
    image = _in_colors(in_eight_bits(image, encoded.white, note) if is_deep(image) else image)
    image = to_srgb(image, encoded.beside.icc, note)
    if turn is not None:
        image = image.transpose(getattr(Image.Transpose, turn))
    image = _on_white(image)
    if varied and not _varied(image):
        color = "#" + bytes(low for low, _ in image.getextrema()).hex()  # type: ignore[misc]
        note(f"what it holds differs from place to place, but what is seen of it is all one color ({color})")
    return image


def _varied(image: Image.Image) -> bool:
    """Whether any two pixels differ."""
    from PIL import Image

    if is_deep(image):
        import numpy as np

        values = np.asarray(image)
        return bool(values.min() != values.max())
    few = image.resize((8, 8), Image.Resampling.NEAREST)  # which mostly tell; all pixels take milliseconds
    return any(low != high for pixels in (few, image) for low, high in _extremes(pixels))


def _extremes(image: Image.Image) -> tuple[tuple[float, float], ...]:
    """The least and the greatest value of each band."""
    found: Any = image.getextrema()
    return found if isinstance(found[0], tuple) else (found,)


def _in_colors(image: Image.Image) -> Image.Image:
    """Palettes, bits and rarer modes as `L`, `LA`, `RGB`, `RGBA`, `CMYK` or `LAB`."""
    if image.mode in ("RGBA", "LA", "CMYK", "LAB"):
        return image
    if image.mode in ("La", "RGBa"):
        return image.convert(image.mode.upper())
    if "transparency" in image.info or image.mode == "PA" or (image.mode == "P" and _palette_has_alpha(image)):
        return image.convert("RGBA")
    if image.mode in ("1", "L"):
        return image.convert("L") if image.mode == "1" else image
    return image if image.mode == "RGB" else image.convert("RGB")


def _palette_has_alpha(image: Image.Image) -> bool:
    return image.palette is not None and image.palette.mode.endswith("A")


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode not in ("RGBA", "LA"):
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image.convert("RGBA") if image.mode == "LA" else image
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white
