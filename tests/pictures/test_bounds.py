"""Memory and time are bounded by what a header says, before anything is decoded."""

from __future__ import annotations

import io
import resource
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from support.picture_files import sample
from support.pictures import noise, png, png_chunk
from support.tiff_files import tiff

from lowmem_bagel.errors import ImageError
from lowmem_bagel.pictures.opening import open_picture

SIDE = 16000
"""A square of these is beyond every bound."""


def patched(data: bytes, place: int, form: str, *numbers: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, place, *numbers)
    return bytes(changed)


def found(data: bytes, mark: bytes, skipped: int) -> int:
    return data.index(mark) + skipped


def jpeg(progressive: bool = False) -> bytes:
    data = sample("jpeg-progressive" if progressive else "jpeg")
    return patched(data, found(data, b"\xff\xc2" if progressive else b"\xff\xc0", 5), ">HH", SIDE, SIDE)


def webp(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(32, 32)).save(file, "WEBP", lossless=kind == "VP8L")
    data = file.getvalue()
    if kind == "VP8L":
        bits = struct.unpack_from("<I", data, 21)[0] & 0xF0000000
        return patched(data, 21, "<I", bits | (SIDE - 1) << 14 | (SIDE - 1))
    if kind == "VP8 ":
        return patched(data, 26, "<HH", SIDE, SIDE)
    sides = struct.pack("<I", SIDE - 1)[:3]
    return data[:12] + b"VP8X" + struct.pack("<IB3x", 10, 0) + sides * 2 + data[12:]


def jpeg2000(name: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(32, 32)).save(file, "JPEG2000", no_jp2=name == "j2k")
    data = file.getvalue()
    at = found(data, b"\xff\x4f\xff\x51", 8)
    data = patched(data, at, ">II", SIDE, SIDE)
    return data if name == "j2k" else patched(data, found(data, b"ihdr", 4), ">II", SIDE, SIDE)


def avif() -> bytes:
    data = sample("avif")
    return patched(data, found(data, b"ispe", 8), ">II", SIDE, SIDE)


def ico_of_png() -> bytes:
    inner = png(noise(4, 4).astype(np.uint16), 8, 2)
    inner = patched(inner, 16, ">II", SIDE, SIDE)
    inner = inner[:29] + struct.pack(">I", zlib.crc32(inner[12:29])) + inner[33:]
    return b"\0\0\1\0\1\0" + struct.pack("<4B2H2I", 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def ico_of_bitmap() -> bytes:
    data = sample("ico-bitmap")
    start = struct.unpack_from("<I", data, 18)[0]
    return patched(data, start + 4, "<ii", SIDE, 2 * SIDE)


def qoi() -> bytes:
    return patched(sample("qoi"), 4, ">II", 2000, 2000)


HEADERS: dict[str, Callable[[], bytes]] = {
    "png": lambda: png_of(SIDE),
    "jpeg": jpeg,
    "jpeg, progressive": lambda: jpeg(True),
    "webp, VP8": lambda: webp("VP8 "),
    "webp, VP8L": lambda: webp("VP8L"),
    "webp, VP8X": lambda: webp("VP8X"),
    "gif": lambda: patched(sample("gif"), 6, "<HH", SIDE, SIDE),
    "avif": avif,
    "tiff": lambda: tiff_of(SIDE, {}),
    "tiff, read here": lambda: tiff_of(SIDE, {258: (32,), 339: (3,)}),
    "bmp": lambda: patched(sample("bmp"), 18, "<ii", SIDE, SIDE),
    "bmp, upside down": lambda: patched(sample("bmp"), 18, "<ii", SIDE, -SIDE),
    "ppm": lambda: b"P6 16000 16000 255 ",
    "pgm": lambda: b"P5 16000 16000 65535 ",
    "digits": lambda: b"P3 16000 16000 255\n1 2 3",
    "pfm": lambda: b"PF 16000 16000 -1.0\n",
    "j2k": lambda: jpeg2000("j2k"),
    "jp2": lambda: jpeg2000("jp2"),
    "dds": lambda: patched(sample("dds-compressed"), 12, "<II", SIDE, SIDE),
    "dds, plain": lambda: patched(sample("dds"), 12, "<II", 2000, 2000),
    "ico of png": ico_of_png,
    "ico of bitmap": ico_of_bitmap,
    "sgi": lambda: patched(sample("sgi"), 6, ">HH", SIDE, SIDE),
    "qoi": qoi,
    "pcx": lambda: patched(sample("pcx"), 8, "<HH", SIDE - 1, SIDE - 1),
    "tga": lambda: patched(sample("tga"), 12, "<HH", SIDE, SIDE),
    "psd": lambda: b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, SIDE, SIDE, 8, 3) + bytes(14) + bytes(99),
}


def png_of(side: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(99))) + png_chunk(b"IEND", b"")


def tiff_of(side: int, others: dict[int, tuple[int, ...]]) -> bytes:
    return tiff(noise(4, 4), 2, others={256: (side,), 257: (side,), 278: (1,), **others})


@contextmanager
def little_is_taken() -> Iterator[None]:
    """Neither half a second of the processor nor 60 MB more than ever before."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - begin < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


@pytest.mark.parametrize("name", HEADERS)
def test_absurd_sizes_are_refused_from_the_header(name: str) -> None:
    data = HEADERS[name]()
    with little_is_taken(), pytest.raises(ImageError, match=r"too large; scale it down to \d+ megapixels"):
        open_picture(data)


def test_a_picture_with_too_many_scans() -> None:
    data = sample("jpeg-progressive")
    scan = data[data.index(b"\xff\xda") : -2]
    with little_is_taken(), pytest.raises(ImageError, match="scans would take too long"):
        open_picture(data[:-2] + scan * 500 + data[-2:])


@pytest.mark.parametrize("others", [{322: (1 << 16,), 323: (1 << 16,)}, {322: (1 << 30,), 323: (16,)}])
def test_a_tile_larger_than_any_picture(others: dict[int, tuple[int, ...]]) -> None:
    with little_is_taken(), pytest.raises(ImageError, match="in one strip or tile are too many"):
        open_picture(tiff(noise(16, 16), 2, tile=(16, 16), others=others))


def test_what_a_file_repeats_without_end_is_not_counted() -> None:
    """Animations, chunks, segments and boxes by the thousand: the first picture is read, or it is refused, at once."""
    frame = Image.fromarray(noise(4, 4)).convert("P")
    file = io.BytesIO()
    frame.save(file, "GIF", save_all=True, append_images=[frame.point(lambda v, n=n: v ^ n) for n in range(1, 200)])
    many = png(noise(4, 4).astype(np.uint16), 8, 2)
    chunked = many[:33] + png_chunk(b"teSt", b"") * 20_000 + many[33:]
    segmented = sample("jpeg")[:2] + b"\xff\xfe\0\2" * 20_000 + sample("jpeg")[2:]
    boxed = sample("avif")[:32] + b"\0\0\0\x08free" * 20_000
    for data in (file.getvalue(), chunked, segmented, boxed):
        begin = time.process_time()
        try:
            open_picture(data)
        except ImageError:
            assert data is boxed
        assert time.process_time() - begin < 3


def test_a_file_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_bagel.pictures.callers.MAX_FILE_BYTES", 1000)
    for source in (bytes(2000), io.BytesIO(bytes(2000)), "data:image/png;base64," + "A" * 3000):
        with pytest.raises(ImageError, match="too large; give one of 0 MB or fewer"):
            open_picture(source)
