"""Which files are opened, told by their content: formats whose decoders are libraries, and start no program."""

from __future__ import annotations

import importlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import ImageError, UserError
from .containers import AVIF_BRANDS, CODESTREAM, HEIF_BRANDS, brands, read_avif, read_heif, read_ico, read_jpeg2000
from .encoded import MAX_BESIDE_BYTES, Beside, Encoded, Source, bytes_of, reason_of
from .jpeg import read_jpeg
from .png import SIGNATURE, read_png
from .pnm import HEADER as PNM
from .pnm import read_pnm
from .tiff import read_tiff
from .webp import read_webp

HEAD_BYTES = 1024
PYTHON_BYTES = 320
"""A pixel, of decoders that take a call in Python for each: 2.5 megapixels are what they manage within seconds."""


@dataclass(frozen=True)
class Kind:
    """A format that is opened."""

    name: str
    fits: Callable[[bytes], bool]
    """Asked with the first bytes of a file."""
    read: Callable[[Source], Encoded]


def by_pillow(module: str, name: str, each: Callable[[bytes], int] = lambda head: 0) -> Callable[[Source], Encoded]:
    """What reads a format by its class in Pillow, which is called by itself: no other format is tried.

    Args:
        each: bytes a pixel that decoding takes besides the picture, told from the first bytes.
    """

    def read(source: Source) -> Encoded:
        source.file.seek(0)
        head = source.file.read(HEAD_BYTES)
        source.file.seek(0)
        image = getattr(importlib.import_module(f"PIL.{module}"), name)(source.file)
        icc = image.info.get("icc_profile")
        return Encoded(image.size, bytes_of(image.mode) + each(head), lambda note: image, Beside(icc))

    return read


def _read_bitmap(source: Source) -> Encoded:
    """A bitmap, with the profile that one of version 5 may hold."""
    encoded = by_pillow("BmpImagePlugin", "BmpImageFile", _bitmap)(source)
    source.file.seek(0)
    head = source.file.read(HEAD_BYTES)
    size, embedded = struct.unpack_from("<I", head, 14)[0], head[70:74] == b"DEBM"
    if size != 124 or not embedded:
        return encoded
    start, length = struct.unpack_from("<II", head, 126)
    source.file.seek(14 + start)
    return replace(encoded, beside=Beside(source.file.read(min(length, MAX_BESIDE_BYTES))))


def _starts(*starts: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(starts)


def _is_heif(head: bytes) -> bool:
    return any(brand in HEIF_BRANDS for brand in brands(head)) or brands(head)[:1] in ((b"mif1",), (b"msf1",))


def _is_targa(head: bytes) -> bool:
    """Targa has no signature: a header whose fields are all possible."""
    if len(head) < 18:
        return False
    _, mapped, kind, _, _, entry, _, _, width, height, depth, flags = struct.unpack_from("<BBBHHBHHHHBB", head)
    colors = (mapped == 1 and entry in (15, 16, 24, 32)) if kind in (1, 9) else mapped in (0, 1)
    return (
        kind in (1, 2, 3, 9, 10, 11)
        and colors
        and depth in (1, 8, 15, 16, 24, 32)
        and width * height > 0
        and flags < 64
    )


def _bitmap(head: bytes) -> int:
    """Compressed bitmaps are decoded run by run in Python."""
    return PYTHON_BYTES if head[:2] == b"BM" and struct.unpack_from("<I", head.ljust(34, b"\0"), 30)[0] in (1, 2) else 0


def _surface(head: bytes) -> int:
    """Surfaces that are not compressed are decoded pixel by pixel in Python."""
    return PYTHON_BYTES if struct.unpack_from("<I", head.ljust(84, b"\0"), 80)[0] & 0x40 else 4


KINDS = (
    Kind("PNG", _starts(SIGNATURE), read_png),
    Kind("JPEG", _starts(b"\xff\xd8\xff"), read_jpeg),
    Kind("WebP", lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", read_webp),
    Kind("GIF", _starts(b"GIF87a", b"GIF89a"), by_pillow("GifImagePlugin", "GifImageFile", lambda head: 4)),
    Kind("AVIF", lambda head: any(brand in AVIF_BRANDS for brand in brands(head)), read_avif),
    Kind("HEIC", _is_heif, read_heif),
    Kind("TIFF", _starts(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), read_tiff),
    Kind("BMP", _starts(b"BM"), _read_bitmap),
    Kind("PPM", lambda head: head[:2] in PNM and head[2:3] in b" \t\r\n#", read_pnm),
    Kind("JPEG 2000", _starts(CODESTREAM, b"\0\0\0\x0cjP  \r\n\x87\n"), read_jpeg2000),
    Kind("DDS", _starts(b"DDS "), by_pillow("DdsImagePlugin", "DdsImageFile", _surface)),
    Kind("ICO", _starts(b"\0\0\1\0"), read_ico),
    Kind("PSD", _starts(b"8BPS"), by_pillow("PsdImagePlugin", "PsdImageFile")),
    Kind("SGI", _starts(b"\x01\xda"), by_pillow("SgiImagePlugin", "SgiImageFile", lambda head: 12)),
    Kind("QOI", _starts(b"qoif"), by_pillow("QoiImagePlugin", "QoiImageFile", lambda head: PYTHON_BYTES)),
    Kind("PCX", lambda head: head[:1] == b"\n" and head[1:2] in (b"\0", b"\2", b"\3", b"\5") and head[2:3] == b"\1",
         by_pillow("PcxImagePlugin", "PcxImageFile", lambda head: 4)),
    Kind("TGA", _is_targa, by_pillow("TgaImagePlugin", "TgaImageFile", lambda head: 4)),
)  # fmt: skip
"""In the order they are tried."""

A_VIDEO = "a video; give it as a Clip, or take one picture out of it"
NOT_PICTURES = (
    (_starts(b"%!PS", b"\xc5\xd0\xd3\xc6", b"\x04%!PS"), "PostScript (EPS), which only another program can draw"),
    (lambda head: b"%PDF-" in head, "a PDF document, which only another program can draw"),
    (_starts(b"\xd7\xcd\xc6\x9a", b"\1\0\t\0"), "a Windows metafile (WMF), which only another program can draw"),
    (lambda head: head[40:44] == b" EMF", "a Windows metafile (EMF), which only another program can draw"),
    (lambda head: b"<svg" in head, "an SVG drawing, which only another program can draw"),
    (_starts(b"\xff\x0a", b"\0\0\0\x0cJXL "), "a JPEG XL picture, which is not read here"),
    (_starts(b"II\xbc\1"), "a JPEG XR picture, which is not read here"),
    (_starts(b"icns"), "a set of icons of macOS, which is not read here"),
    (_starts(b"gimp xcf"), "a GIMP document (XCF), which is not read here"),
    (_starts(b"v/1\1"), "an OpenEXR picture, which is not read here"),
    (_starts(b"#?RADIANCE", b"#?RGBE"), "a Radiance picture (HDR), which is not read here"),
    (_starts(b"SIMPLE  ="), "a FITS file, which is not read here"),
    (lambda head: bool(brands(head)) or head[8:12] == b"AVI ", A_VIDEO),
    (_starts(b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3"), A_VIDEO),
    (_starts(b"version https://git-lfs"), "a Git LFS pointer in the picture's place; fetch it with git lfs pull"),
    (lambda head: head.lstrip()[:9].lower() in (b"<!doctype", b"<html>"), "a web page in the picture's place"),
)  # fmt: skip
"""What people take for pictures, and what is said of it."""


def _read(kind: Kind, source: Source) -> Encoded:
    try:
        return kind.read(source)
    except UserError:
        raise
    except Exception as error:  # decoders raise whatever they meet in headers that they cannot make sense of
        what = f"damaged, or {kind.name} of a kind that is not read ({reason_of(error)})"
        raise ImageError(f"{source.name}: {what}; save it as PNG or JPEG") from error


def read_header(source: Source) -> Encoded:
    """What the header of a file says.

    Raises:
        ImageError: it is of no format that is opened.
    """
    source.file.seek(0)
    head = source.file.read(HEAD_BYTES)
    for kind in KINDS:
        if kind.fits(head):
            return _read(kind, source)
    what = next((what for fits, what in NOT_PICTURES if fits(head)), None)
    if what is not None:
        raise ImageError(f"{source.name}: {what}; save it as PNG or JPEG")
    names = ", ".join(kind.name for kind in KINDS)
    raise ImageError(f"{source.name}: not a picture in a format that is read ({names}); save it as PNG or JPEG")
