"""WebP: the chunks of the first picture go to the decoder; profile, EXIF and XMP are read here."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from .encoded import MAX_BESIDE_BYTES, Beside, Encoded, Source
from .pieces import Piece, pieced

STILL = (b"ALPH", b"VP8 ", b"VP8L")
ALPHA, ANIMATED = 0x10, 0x02
MAX_CHUNKS = 1 << 16
BYTES_A_PIXEL = 18
"""The animation decoder holds two canvases, and hands a third over; a lossless frame is decoded into a fourth."""


class Chunk(NamedTuple):
    kind: bytes
    start: int
    end: int
    """Of what it holds, without padding."""


def chunks(source: Source) -> Iterator[Chunk]:
    place = 12
    for _ in range(MAX_CHUNKS):
        source.file.seek(place)
        head = source.file.read(8)
        if len(head) < 8:
            return
        kind, length = struct.unpack("<4sI", head)
        yield Chunk(kind, place, min(place + 8 + length, source.length))
        place += 8 + length + (length & 1)


def beside_webp(source: Source) -> Beside:
    """What the metadata chunks say, as far as it is there."""
    said: dict[bytes, bytes] = {}
    for kind, start, end in chunks(source):
        if kind in (b"ICCP", b"EXIF", b"XMP "):
            source.file.seek(start + 8)
            said.setdefault(kind, source.file.read(min(end - start - 8, MAX_BESIDE_BYTES)))
    return Beside(said.get(b"ICCP"), said.get(b"EXIF"), said.get(b"XMP "))


def read_webp(source: Source) -> Encoded:
    from PIL import WebPImagePlugin

    found: dict[bytes, Chunk] = {}
    for chunk in chunks(source):
        found.setdefault(chunk.kind, chunk)
    size = _canvas(source)
    kept = [found[kind] for kind in (b"ANIM", b"ANMF") if kind in found] or [found[k] for k in STILL if k in found]
    body: list[Piece] = []
    if b"VP8X" in found:
        flags = (ANIMATED if b"ANMF" in found else 0) | (_flags(source, found[b"VP8X"]) & ALPHA)
        sides = b"".join(struct.pack("<I", side - 1)[:3] for side in size)
        body.append(b"VP8X" + struct.pack("<IB3x", 10, flags) + sides)
    for chunk in kept:
        body += [(chunk.start, chunk.end), b"\0" * ((chunk.end - chunk.start) & 1)]
    length = 4 + sum(len(p) if isinstance(p, bytes) else p[1] - p[0] for p in body)
    pieces: list[Piece] = [b"RIFF" + struct.pack("<I", length) + b"WEBP", *body]
    # The decoder takes memory for the whole canvas when it is made, so it is made only after the size was checked.
    return Encoded(
        size,
        BYTES_A_PIXEL,
        lambda note: WebPImagePlugin.WebPImageFile(pieced(source.file, pieces)),
        beside_webp(source),
    )


def _flags(source: Source, chunk: Chunk) -> int:
    source.file.seek(chunk.start + 8)
    return source.file.read(1)[0]


def _canvas(source: Source) -> tuple[int, int]:
    """Width and height, from whichever chunk comes first."""
    source.file.seek(12)
    head = source.file.read(18)
    if head[:4] == b"VP8X":
        width, height = (struct.unpack("<I", head[at : at + 3] + b"\0")[0] + 1 for at in (12, 15))
    elif head[:4] == b"VP8L":
        bits = struct.unpack_from("<I", head, 9)[0]
        width, height = (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", head, 14))
    return width, height
