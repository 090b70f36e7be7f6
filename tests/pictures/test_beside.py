"""What lies beside the pixels, however damaged or large, never keeps good pixels from being read."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from support.pictures import noise, pixels, png_chunk
from support.tiff_files import tiff

from lowmem_bagel.pictures.opening import open_picture

VALUES = noise(16, 24)
BOMB = zlib.compress(bytes(80_000_000))
JUNK = (b"", b"\xff", b"MM\0*", b"II*\0\x08\0\0\0\xff\xff", b"II*\0\xff\xff\xff\xff", bytes(range(256)) * 3)
EXIF_JUNK = tuple(b"Exif\0\0" + junk for junk in JUNK)


def saved(kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(VALUES).save(file, kind, **options)
    return file.getvalue()


def same(data: bytes, clean: bytes | None = None) -> bool:
    wanted = VALUES if clean is None else pixels(open_picture(clean).image)
    return bool((pixels(open_picture(data).image) == wanted).all())


def wrong_sum(kind: bytes, body: bytes) -> bytes:
    chunk = png_chunk(kind, body)
    return chunk[:-4] + b"\0\1\2\3"


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"note\0\0" + BOMB),
        png_chunk(b"iTXt", b"note\0\1\0\0\0" + BOMB),
        png_chunk(b"iTXt", b"note\0\0\0\0\0\xff\xfe not UTF-8"),
        png_chunk(b"iTXt", b"lowmem-bagel"),
        png_chunk(b"iCCP", b"bomb\0\0" + BOMB),
        png_chunk(b"tEXt", b"note\0" + b"x" * 2_000_000) * 3,
        wrong_sum(b"tEXt", b"note\0text"),
        wrong_sum(b"iCCP", b"made\0\0text"),
        png_chunk(b"pHYs", b"\0"),
        png_chunk(b"gAMA", b"\0"),
        png_chunk(b"sRGB", b""),
        png_chunk(b"acTL", b"\0\0"),
        png_chunk(b"fcTL", b"\xff" * 26),
        png_chunk(b"tRNS", b"\0"),
        png_chunk(b"\0\1\2\3", b"no name"),
        *(png_chunk(b"eXIf", junk) for junk in JUNK),
        png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 4\nzz")),
    ],
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_png(chunk: bytes, place: str) -> None:
    data = saved("PNG")
    at = 33 if place == "before" else len(data) - 12
    assert same(data[:at] + chunk + data[at:])


def test_png_cut_off_after_its_pixels() -> None:
    data = saved("PNG")
    assert same(data[:-12] + struct.pack(">I4s", 1 << 30, b"tEXt") + b"note")
    assert same(data[:-12])


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


@pytest.mark.parametrize(
    "added",
    [
        *(segment(0xE1, junk) for junk in EXIF_JUNK),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta \xff"),
        segment(0xE2, b"ICC_PROFILE\0\2\3half a profile"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xE2, b"MPF\0MM\0*\xff\xff\xff\xff"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
        segment(0xEE, b"Adobe"),
        segment(0xFE, b"\xff" * 60_000) * 4,
        b"\xff\xe1\xff\xf0Exif\0\0",
    ],
)
def test_jpeg(added: bytes) -> None:
    data = saved("JPEG", quality=95)
    assert same(data[:2] + added + data[2:], data)


def chunk(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("<I", len(body)) + body + bytes(len(body) & 1)


@pytest.mark.parametrize(
    "after",
    [
        *(chunk(b"EXIF", junk) for junk in JUNK),
        chunk(b"XMP ", b"\xff" * 99),
        chunk(b"odd!", b"x"),
        b"EXIF\xff\xff\xff\x7fcut off",
        b"EXIF",
    ],
)
@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}])
def test_webp(after: bytes, options: dict[str, object]) -> None:
    clean = saved("WEBP", **options)
    body = clean[12:]
    extended = (
        chunk(b"VP8X", bytes([0x0C, 0, 0, 0]) + struct.pack("<I", 23)[:3] + struct.pack("<I", 15)[:3]) + body + after
    )
    for size in (4 + len(extended), 12, 2**32 - 1):
        assert same(b"RIFF" + struct.pack("<I", size) + b"WEBP" + extended, clean)


@pytest.mark.parametrize("junk", [(1 << 31,), (0,), (2**32 - 1,) * 40])
@pytest.mark.parametrize("tag", [270, 282, 305, 700, 33723, 34377, 34665, 34675, 34853, 37724, 42112, 65000])
def test_tiff(tag: int, junk: tuple[int, ...]) -> None:
    assert same(tiff(VALUES, 2, others={tag: junk}))


def test_tiff_with_a_value_beyond_its_end() -> None:
    data = tiff(VALUES, 2, others={34675: (1, 2, 3)})
    entry = data.index(struct.pack("<HH", 34675, 4))
    assert same(data[: entry + 4] + struct.pack("<II", 1 << 30, 1 << 31) + data[entry + 12 :])


@pytest.mark.parametrize("junk", JUNK[1:])
def test_avif(junk: bytes) -> None:
    clean = saved("AVIF", speed=10)
    exif = Image.Exif()
    exif[0x010E] = "x" * len(junk)
    data = saved("AVIF", speed=10, exif=exif)
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    assert block in data
    assert same(data.replace(block, junk[: len(block)].ljust(len(block), b"\xff")), clean)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_read_in_every_format(kind: str, orientation: int) -> None:
    """From EXIF, from the tag of a TIFF, from the boxes of an AVIF."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"AVIF": {"speed": 10}, "WEBP": {"lossless": True}}.get(kind, {})
    upright = pixels(open_picture(saved(kind, **options)).image)
    turned = pixels(open_picture(saved(kind, exif=exif, **options)).image)
    ways = {
        2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, -1), 7: np.rot90(upright.transpose(1, 0, 2), 2), 8: np.rot90(upright),
    }  # fmt: skip
    assert (turned == ways[orientation]).all()


@pytest.mark.parametrize("form", [b' tiff:Orientation="6" ', b"<tiff:Orientation>6</tiff:Orientation>"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_orientation_in_xmp(kind: str, form: bytes) -> None:
    options: dict[str, object] = {"WEBP": {"lossless": True}}.get(kind, {})
    clean = saved(kind, **options)
    if kind == "PNG":
        data = clean[:33] + png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + form) + clean[33:]
    else:
        data = saved(kind, xmp=form, **options)
    wanted = np.rot90(pixels(open_picture(clean).image), -1)
    assert (pixels(open_picture(data).image) == wanted).all()


@pytest.mark.parametrize("junk", EXIF_JUNK)
def test_opened_by_the_caller(junk: bytes) -> None:
    image = Image.fromarray(VALUES)
    image.info["exif"] = junk
    assert (pixels(open_picture(image).image) == VALUES).all()


def test_only_the_first_picture_of_an_animation_counts() -> None:
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        file = io.BytesIO()
        first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
        first.save(file, kind, save_all=True, append_images=[second] * 3)
        assert np.abs(pixels(open_picture(file.getvalue()).image) - [255, 0, 0]).max() <= 3
