"""Pictures in boxes and in tables of contents: AVIF, HEIC, JPEG 2000 and ICO."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import ImageError, MissingExtraError
from .encoded import MAX_BESIDE_BYTES, Beside, Encoded, Note, Source
from .pieces import Piece, pieced
from .png import SIGNATURE as PNG
from .png import read_png
from .spaces import of_numbers

MAX_BOXES = 4096
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs")
AVIF_BRANDS = (b"avif", b"avis")
CODED_BYTES = 14
"""Bytes a pixel that the decoders of AVIF and HEIC take: planes, references, RGB, and Pillow's copy."""
WAVELET_BYTES = 5
"""Bytes a pixel and component that OpenJPEG takes."""
MAX_COMPONENTS = 8
EXIF_ITEM = re.compile(rb"(infe(?:\x02.{5}|\x03.{7})..)Exif", re.DOTALL)
"""An item's entry: version, flags, its number, its protection, its type."""
CODESTREAM = b"\xff\x4f\xff\x51"


class Box(NamedTuple):
    kind: bytes
    start: int
    """Of what it holds."""
    end: int


def boxes(source: Source, start: int, end: int) -> Iterator[Box]:
    """The boxes of a stretch of the file."""
    for _ in range(MAX_BOXES):
        source.file.seek(start)
        head = source.file.read(16)
        if len(head) < 8 or start >= end:
            return
        length, kind = struct.unpack_from(">I4s", head)
        skipped = 8
        if length == 1 and len(head) == 16:
            length, skipped = struct.unpack_from(">Q", head, 8)[0], 16
        stop = end if length == 0 else min(start + length, end)
        yield Box(kind, start + skipped, stop)
        if length and length < skipped:
            return
        start = stop


def brands(head: bytes) -> tuple[bytes, ...]:
    """The brands that a file says it is of, the major one first; none where it is not of this family."""
    if head[4:8] != b"ftyp":
        return ()
    end = min(struct.unpack_from(">I", head)[0], len(head))
    return (head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4)))


def read_avif(source: Source) -> Encoded:
    from PIL import AvifImagePlugin

    if not AvifImagePlugin.SUPPORTED:
        raise ImageError(f"{source.name}: this Pillow was built without AVIF; save it as PNG or JPEG")
    # What EXIF says of orientation does not count here, and damaged EXIF would keep the picture from being read.
    image = AvifImagePlugin.AvifImageFile(pieced(source.file, _without_exif(source)))
    notes: list[str] = []
    icc = image.info.get("icc_profile") or _named_space(source, notes.append)
    beside = Beside(icc, image.info.get("exif"))
    return Encoded(image.size, CODED_BYTES, lambda note: image, beside, notes=tuple(notes))


def _named_space(source: Source, note: Note) -> bytes | None:
    """The profile of the code points that the first color box names."""
    found = re.search(rb"colrnclx(....)", _meta(source)[1], re.DOTALL)
    return None if found is None else of_numbers(*_two_numbers(found[1]), note)


def _two_numbers(data: bytes) -> tuple[int, int]:
    return int.from_bytes(data[:2]), int.from_bytes(data[2:])


def _meta(source: Source) -> tuple[int, bytes]:
    """Where the box of properties begins, and what it holds."""
    meta = next((box for box in boxes(source, 0, source.length) if box.kind == b"meta"), None)
    if meta is None:
        return source.length, b""
    source.file.seek(meta.start)
    return meta.start, source.file.read(min(meta.end - meta.start, MAX_BESIDE_BYTES))


def _without_exif(source: Source) -> list[Piece]:
    """The file with its items of the type Exif called something else."""
    start, said = _meta(source)
    return [(0, start), EXIF_ITEM.sub(rb"\1none", said), (start + len(said), source.length)]


def read_heif(source: Source) -> Encoded:
    try:
        import pillow_heif
    except ImportError as error:
        raise MissingExtraError(
            f"{source.name} is a HEIC picture, which needs an extra: pip install 'lowmem-bagel[heif]'; "
            "or save it as PNG or JPEG"
        ) from error
    source.file.seek(0)
    image = pillow_heif.open_heif(source.file)
    notes: list[str] = []
    icc = image.info.get("icc_profile") or _named_space(source, notes.append)
    return Encoded(image.size, CODED_BYTES, lambda note: image.to_pillow(), Beside(icc), notes=tuple(notes))


def read_jpeg2000(source: Source) -> Encoded:
    from PIL import Jpeg2KImagePlugin

    stream, icc = _codestream(source)
    source.file.seek(stream)
    head = source.file.read(42)
    if not head.startswith(CODESTREAM) or len(head) < 42:
        raise ImageError(f"{source.name}: damaged or truncated picture (no codestream); save it again")
    right, bottom, left, top, tile_width, tile_height = struct.unpack_from(">6I", head, 8)
    components = struct.unpack_from(">H", head, 40)[0]
    if not 1 <= components <= MAX_COMPONENTS or not tile_width or not tile_height:
        raise ImageError(f"{source.name}: damaged picture ({components} components); save it again")
    image = Jpeg2KImagePlugin.Jpeg2KImageFile(pieced(source.file, [(0, source.length)]))
    coded = (right - left, bottom - top)
    if coded != image.size:
        raise ImageError(f"{source.name}: damaged picture (it says two sizes); save it again")
    return Encoded(coded, WAVELET_BYTES * components + 6, lambda note: image, Beside(icc), 65535.0)


def _codestream(source: Source) -> tuple[int, bytes | None]:
    """Where the codestream begins, and the color profile."""
    source.file.seek(0)
    if source.file.read(4) == CODESTREAM:
        return 0, None
    icc = None
    for box in boxes(source, 0, source.length):
        if box.kind == b"jp2c":
            return box.start, icc
        for inner in boxes(source, box.start, box.end) if box.kind == b"jp2h" else ():
            source.file.seek(inner.start)
            if inner.kind == b"colr" and source.file.read(3)[:1] == b"\2":
                icc = icc or source.file.read(min(inner.end - inner.start - 3, MAX_BESIDE_BYTES))
    return source.length, icc


def read_ico(source: Source) -> Encoded:
    """The largest icon, of those the deepest, whichever way it is stored."""
    from PIL import IcoImagePlugin

    source.file.seek(0)
    head = source.file.read(6)
    table = source.file.read(16 * struct.unpack_from("<H", head, 4)[0])
    entries = [table[at : at + 16] for at in range(0, len(table) - 15, 16)]
    if not entries:
        raise ImageError(f"{source.name}: damaged or truncated picture (no icon in it); save it again")
    best = max(entries, key=lambda e: ((e[0] or 256) * (e[1] or 256), struct.unpack_from("<H", e, 6)[0]))
    length, start = struct.unpack_from("<II", best, 8)
    stretch = (min(start, source.length), min(start + length, source.length))
    source.file.seek(stretch[0])
    begin = source.file.read(16)
    if begin.startswith(PNG):
        return read_png(Source(pieced(source.file, [stretch]), stretch[1] - stretch[0], source.name))
    one = head[:4] + b"\1\0" + best[:12] + struct.pack("<I", 22)
    width, height = struct.unpack_from("<Ii", begin, 4)
    return Encoded(
        (width, abs(height) // 2), 24, lambda note: IcoImagePlugin.IcoImageFile(pieced(source.file, [one, stretch]))
    )
