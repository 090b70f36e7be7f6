"""JPEG: the segments that make the pixels go to the decoder; profile, EXIF and XMP are read here."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import ImageError
from .encoded import Beside, Encoded, Source, bytes_of
from .pieces import Piece, pieced

START, SCAN, END = 0xD8, 0xDA, 0xD9
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
TABLES = (0xC4, 0xCC, 0xDB, 0xDC, 0xDD)
APPLICATION, EXIF_XMP, ICC, ADOBE = 0xE0, 0xE1, 0xE2, 0xEE
COMMENT = 0xFE
ALONE = (0x01, *range(0xD0, 0xD8))
"""Markers without a length."""
KNOWN = frozenset({*FRAMES, *TABLES, SCAN, END, COMMENT, *range(0xE0, 0xF0)})
MAX_SEGMENTS = 1 << 16
MAX_SCANS = 200
SCANNED_PIXELS = 4_000_000_000
"""Pixels, times scans, of a progressive picture that decode within seconds."""
XMP_HEAD = b"http://ns.adobe.com/xap/1.0/\0"
ICC_HEAD = b"ICC_PROFILE\0"
SEARCHED = 1 << 16


class Segment(NamedTuple):
    marker: int
    start: int
    end: int


def segments(source: Source) -> Iterator[Segment]:
    """The segments up to the first scan, its header included. A length that leads nowhere is not believed."""
    place = 2
    for _ in range(MAX_SEGMENTS):
        source.file.seek(place)
        window = source.file.read(SEARCHED)
        skipped = _next_marker(window)
        if skipped is None:
            return
        place += skipped
        marker = window[skipped + 1]
        if marker in ALONE:
            place += 2
            continue
        if marker == END or len(window) < skipped + 4:
            return
        end = place + 2 + struct.unpack_from(">H", window, skipped + 2)[0]
        if marker >= APPLICATION and not _at_marker(source, end):
            place += 2
            continue
        yield Segment(marker, place, end)
        if marker == SCAN:
            return
        place = end


def _next_marker(window: bytes) -> int | None:
    at = window.find(b"\xff")
    while at >= 0 and at + 1 < len(window):
        if window[at + 1] in KNOWN or window[at + 1] in ALONE:
            return at
        at = window.find(b"\xff", at + 1)
    return None


def _at_marker(source: Source, place: int) -> bool:
    source.file.seek(place)
    return source.file.read(1) == b"\xff"


def body(source: Source, segment: Segment) -> bytes:
    source.file.seek(segment.start + 4)
    return source.file.read(segment.end - segment.start - 4)


def beside_jpeg(source: Source) -> Beside:
    """What the application's segments say."""
    icc: dict[int, bytes] = {}
    exif = xmp = None
    for segment in segments(source):
        data = body(source, segment) if segment.marker in (EXIF_XMP, ICC) else b""
        if segment.marker == ICC and data.startswith(ICC_HEAD) and len(data) > 14:
            icc.setdefault(data[12], data[14:])
        elif data.startswith(b"Exif\0\0"):
            exif = exif or data
        elif data.startswith(XMP_HEAD):
            xmp = xmp or data.removeprefix(XMP_HEAD)
    return Beside(b"".join(icc[number] for number in sorted(icc)) or None, exif, xmp)


def read_jpeg(source: Source) -> Encoded:
    from PIL import JpegImagePlugin

    found = list(segments(source))
    pieces: list[Piece] = [(0, 2)]
    pieces += [(s.start, s.end) for s in found if _makes_pixels(source, s)]
    pieces.append((found[-1].end if found else 2, source.length))
    image = JpegImagePlugin.JpegImageFile(pieced(source.file, pieces))
    frame = next((s.marker for s in found if s.marker in FRAMES), 0)
    parts = len(image.getbands())
    scan = next((body(source, s) for s in found if s.marker == SCAN), b"\0")
    # A picture of several scans is held whole as coefficients, two bytes each.
    held = 2 * parts if frame in PROGRESSIVE or scan[0] < parts else 0
    if frame in PROGRESSIVE:
        _check_scans(source, image.size)
    return Encoded(image.size, bytes_of(image.mode) + held, lambda note: image, beside_jpeg(source))


def _makes_pixels(source: Source, segment: Segment) -> bool:
    """Of the application's segments only those that say how colors are stored."""
    if segment.marker < APPLICATION:
        return True
    head, size = {APPLICATION: (b"JFIF\0", 14), ADOBE: (b"Adobe", 12)}.get(segment.marker, (b"", 1 << 16))
    said = body(source, segment)
    return len(said) >= size and said.startswith(head)


def _check_scans(source: Source, size: tuple[int, int]) -> None:
    source.file.seek(0)
    scans = 0
    while data := source.file.read(1 << 22):
        scans += data.count(b"\xff\xda")
    if scans > MAX_SCANS or scans * size[0] * size[1] > SCANNED_PIXELS:
        raise ImageError(f"{source.name}: {scans} scans would take too long; save it again, not progressive")
