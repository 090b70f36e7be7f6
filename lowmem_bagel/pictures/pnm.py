"""PBM, PGM, PPM and PFM, read here: Pillow takes a call a sample for most of them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import ImageError
from .depth import from_samples, scaled
from .encoded import Encoded, Note, Source, bytes_of

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL import Image

GAP = rb"(?:[ \t\r\n]|#[^\n]*\n)+"
HEADER = {
    b"P1": rb"P1" + GAP + rb"(\d{1,9})" + GAP + rb"(\d{1,9})()\s",
    b"P4": rb"P4" + GAP + rb"(\d{1,9})" + GAP + rb"(\d{1,9})()\s",
    b"Pf": rb"Pf" + GAP + rb"(\d{1,9})" + GAP + rb"(\d{1,9})" + GAP + rb"([-+.\deE]{1,20})\s",
}
GREY_OR_COLOR = GAP + rb"(\d{1,9})" + GAP + rb"(\d{1,9})" + GAP + rb"(\d{1,5})\s"
HEADER |= {kind: kind + GREY_OR_COLOR for kind in (b"P2", b"P3", b"P5", b"P6")}
HEADER[b"PF"] = HEADER[b"Pf"].replace(b"Pf", b"PF")
COLORED = (b"P3", b"P6", b"PF")
HEADER_BYTES = 1 << 16
BYTES_OF_TEXT = 16
"""Of memory, that a sample in digits takes."""


def read_pnm(source: Source) -> Encoded:
    source.file.seek(0)
    head = source.file.read(HEADER_BYTES)
    kind = head[:2]
    found = re.match(HEADER[kind], head)
    if found is None:
        raise ImageError(f"{source.name}: damaged or truncated picture (its header is incomplete); save it again")
    width, height = int(found[1]), int(found[2])
    samples = 3 if kind in COLORED else 1
    each = BYTES_OF_TEXT if kind in (b"P1", b"P2", b"P3") else 8 if kind in (b"Pf", b"PF") else 2

    def decode(note: Note) -> Image.Image:
        source.file.seek(found.end())
        values = READ[kind](source, (height, width, samples), found[3])
        return _pictured(kind, values, found[3], note)

    return Encoded((width, height), each * samples + bytes_of("L"), decode)


def _pictured(kind: bytes, values: ndarray, said: bytes, note: Note) -> Image.Image:
    if kind in (b"Pf", b"PF"):
        return from_samples(values, None, False, 1, "32-bit floats", note)
    white = int(said) if said else 1
    if not 1 <= white <= 65535:
        raise ValueError(f"white is said to be {white}")
    return scaled(values if values.shape[2] == 3 else values[..., 0], 0, white)


def _bits(source: Source, shape: tuple[int, ...], said: bytes) -> ndarray:
    import numpy as np

    height, width, _ = shape
    row = (width + 7) // 8
    packed = np.frombuffer(_exactly(source, row * height), np.uint8).reshape(height, row)
    return 1 - np.unpackbits(packed, axis=1)[:, :width, None]


def _binary(source: Source, shape: tuple[int, ...], said: bytes) -> ndarray:
    import numpy as np

    kind = np.dtype(np.uint8 if int(said) < 256 else ">u2")
    return np.frombuffer(_exactly(source, _count(shape) * kind.itemsize), kind).reshape(shape)


def _floats(source: Source, shape: tuple[int, ...], said: bytes) -> ndarray:
    """Rows from the bottom; a negative scale says that the lowest byte comes first."""
    import numpy as np

    kind = np.dtype("<f4" if float(said) < 0 else ">f4")
    return np.frombuffer(_exactly(source, _count(shape) * 4), kind).reshape(shape)[::-1]


def _digits(source: Source, shape: tuple[int, ...], said: bytes) -> ndarray:
    import numpy as np

    count = _count(shape)
    text = re.sub(rb"#[^\n]*", b"", source.file.read(count * (BYTES_OF_TEXT // 2)))
    if text.translate(None, b"0123456789 \t\r\n\v\f"):
        raise ValueError("something else than digits among the samples")
    values = (np.frombuffer(text.translate(None, b" \t\r\n\v\f"), np.uint8) - 48) if not said else _numbers(text)
    if values.size < count:
        raise ValueError("the samples end too soon")
    return (1 - values[:count] if not said else values[:count]).reshape(shape)


def _numbers(text: bytes) -> ndarray:
    import numpy as np

    return np.fromstring(text.decode("ascii"), np.int32, sep=" ") if text.strip() else np.empty(0, np.int32)


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1] * shape[2]


def _exactly(source: Source, size: int) -> bytes:
    data = source.file.read(size)
    if len(data) < size:
        raise ValueError("the samples end too soon")
    return data


READ = {
    b"P1": _digits, b"P2": _digits, b"P3": _digits, b"P4": _bits, b"P5": _binary, b"P6": _binary,
    b"Pf": _floats, b"PF": _floats,
}  # fmt: skip
