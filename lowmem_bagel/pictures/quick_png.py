"""PNG for who waits for it: every row as its difference to the one above, runs and Huffman codes alone.

Pillow tries every filter on every row, and zlib looks for what repeats, which takes most of their time and finds little
in pictures. Both the filter and zlib let other threads go on, so that a picture is packed in parts at a time.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from .png import SIGNATURE

if TYPE_CHECKING:
    from PIL import Image

EIGHT_BITS, RGB, NO_CHOICE = 8, 2, 0
UP = 2
"""The filter: what is above is taken off."""
PARTS = 8
"""Of a picture, packed at the same time."""
ZLIB_HEADER = b"\x78\x01"


def quick_png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """An RGB picture's file, with texts under Latin-1 names."""
    assert image.mode == "RGB"
    header = struct.pack(">IIBBBBB", *image.size, EIGHT_BITS, RGB, NO_CHOICE, NO_CHOICE, NO_CHOICE)
    said = (_chunk(b"iTXt", _text(name, text)) for name, text in texts.items())
    pixels = _chunk(b"IDAT", _compressed(image))
    return b"".join([SIGNATURE, _chunk(b"IHDR", header), *said, pixels, _chunk(b"IEND", b"")])


def _compressed(image: Image.Image) -> bytes:
    import numpy as np

    values = np.asarray(image).reshape(image.height, -1)
    rows = np.empty((image.height, values.shape[1] + 1), dtype=np.uint8)
    rows[:, 0] = UP
    rows[0, 1:] = values[0]
    np.subtract(values[1:], values[:-1], out=rows[1:, 1:])
    parts = np.array_split(rows, min(PARTS, image.height))
    ends = [zlib.Z_SYNC_FLUSH] * (len(parts) - 1) + [zlib.Z_FINISH]
    with ThreadPoolExecutor(len(parts)) as pool:
        packed = pool.map(_packed, (part.data for part in parts), ends)
        return b"".join([ZLIB_HEADER, *packed, struct.pack(">I", zlib.adler32(rows.data))])


def _packed(rows: memoryview, end: int) -> bytes:
    """A part of a deflate stream, up to a whole byte."""
    packing = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    return packing.compress(rows) + packing.flush(end)


def _text(name: str, text: str) -> bytes:
    """Not compressed, of no language."""
    return name.encode("latin-1") + b"\0\0\0\0\0" + text.encode()


def _chunk(kind: bytes, body: bytes) -> bytes:
    return b"".join([struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))])
