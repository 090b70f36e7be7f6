"""PNG: the chunks that make the pixels go to the decoder; profile, EXIF and texts are read here, within bounds."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from .encoded import MAX_BESIDE_BYTES, Beside, Encoded, Note, Source, bytes_of
from .pieces import Piece, pieced
from .spaces import of_gamma, of_numbers

if TYPE_CHECKING:
    from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
PALETTE = 3
MAX_CHUNKS = 1 << 18
RAW_EXIF = b"Raw profile type exif"
XMP = b"XML:com.adobe.xmp"
SPACES = (b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM")


class Chunk(NamedTuple):
    kind: bytes
    start: int
    """Of the chunk's length field."""
    length: int


def chunks(source: Source) -> Iterator[Chunk]:
    """The chunks up to the end of the picture; the last may be cut off."""
    place = len(SIGNATURE)
    for _ in range(MAX_CHUNKS):
        source.file.seek(place)
        head = source.file.read(8)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head)
        yield Chunk(kind, place, length)
        place += 12 + length
        if kind == b"IEND":
            return


def body(source: Source, chunk: Chunk) -> bytes:
    """What a chunk holds, if no more than may lie beside pixels."""
    source.file.seek(chunk.start + 8)
    return source.file.read(min(chunk.length, MAX_BESIDE_BYTES))


def read_png(source: Source) -> Encoded:
    from PIL import PngImagePlugin

    found = list(chunks(source))
    header = next(body(source, c) for c in found if c.kind == b"IHDR")
    bits, color = header[8], header[9]
    kinds = (*PIXELS, b"tRNS") if color == PALETTE else PIXELS
    pieces: list[Piece] = [SIGNATURE]
    pieces += [(c.start, min(c.start + 12 + c.length, source.length)) for c in found if c.kind in kinds]
    transparent = next((body(source, c) for c in found if c.kind == b"tRNS"), b"")
    notes: list[str] = []
    beside = _beside(source, found, notes.append)
    image = PngImagePlugin.PngImageFile(pieced(source.file, pieces))

    def decode(note: Note) -> Image.Image:
        image.load()
        return _with_transparency(image, bits, color, transparent)

    held = bytes_of(image.mode) + (8 if transparent else 0)
    white = 65535.0 if bits == 16 else None
    return Encoded(image.size, held, decode, beside, white, tuple(notes))


def texts(source: Source) -> Iterator[tuple[bytes, bytes]]:
    """Keywords and what they say, of iTXt and zTXt chunks that can be read."""
    for chunk in chunks(source):
        if chunk.kind in (b"iTXt", b"zTXt"):
            keyword, _, rest = body(source, chunk).partition(b"\0")
            compressed, skipped = (True, 1) if chunk.kind == b"zTXt" else (rest[:1] == b"\1", 2)
            said = rest[skipped:]
            if chunk.kind == b"iTXt":
                said = said.partition(b"\0")[2].partition(b"\0")[2]
            yield keyword, (_inflated(said) or b"") if compressed else said


def _beside(source: Source, found: list[Chunk], note: Note) -> Beside:
    said = dict(texts(source)) if any(c.kind in (b"iTXt", b"zTXt") for c in found) else {}
    exif = next((body(source, c) for c in found if c.kind == b"eXIf"), None)
    return Beside(_profile(source, found, note), exif or _raw_exif(said.get(RAW_EXIF)), said.get(XMP))


def _profile(source: Source, found: list[Chunk], note: Note) -> bytes | None:
    """The color space, from whichever chunk goes before the others."""
    said = {c.kind: body(source, c) for c in reversed(found) if c.kind in SPACES}
    if len(numbers := said.get(b"cICP", b"")) == 4:
        return of_numbers(numbers[0], numbers[1], note)
    if b"iCCP" in said:
        icc = _inflated(said[b"iCCP"].partition(b"\0")[2][1:])
        if not icc:
            note("its color profile is damaged and was left out of account")
        return icc
    gamma, points = said.get(b"gAMA", b""), said.get(b"cHRM", b"")
    if b"sRGB" in said or len(gamma) != 4:
        return None
    chromaticities = struct.unpack(">8I", points) if len(points) == 32 else ()
    return of_gamma(struct.unpack(">I", gamma)[0] / 100_000, [value / 100_000 for value in chromaticities])


def _inflated(data: bytes) -> bytes | None:
    try:
        return zlib.decompressobj().decompress(data, MAX_BESIDE_BYTES)
    except zlib.error:
        return None


def _raw_exif(text: bytes | None) -> bytes | None:
    """EXIF as ImageMagick writes it: a name, a length, and hexadecimal digits."""
    try:
        return bytes.fromhex("".join((text or b"").decode("latin-1").split()[2:]))
    except ValueError:
        return None


def _with_transparency(image: Image.Image, bits: int, color: int, transparent: bytes) -> Image.Image:
    """The color that a PNG names as transparent, in the samples that Pillow gives."""
    count = {0: 1, 2: 3}.get(color, 0)
    if not count or len(transparent) < 2 * count:
        return image
    named = struct.unpack_from(f">{count}H", transparent)
    if color == 0 and bits == 16:
        return _grey_with_alpha(image, named[0])
    scale = [value >> 8 if bits == 16 else value * 255 // ((1 << bits) - 1) for value in named]
    if max(scale) > 255:
        return image
    plain = image.convert("L") if image.mode == "1" else image
    plain.info["transparency"] = scale[0] if color == 0 else tuple(scale)
    return plain


def _grey_with_alpha(image: Image.Image, named: int) -> Image.Image:
    import numpy as np
    from PIL import Image

    from .depth import scaled

    values = np.asarray(image)
    return Image.merge("LA", (scaled(values, 0, 65535), Image.fromarray((values != named).astype(np.uint8) * 255)))
