"""One small file of every format that is opened, and what damage does to files."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from random import Random

import numpy as np
from PIL import Image, ImageCms

from support.pictures import noise

WRITTEN: Mapping[str, tuple[str, str, dict[str, object]]] = {
    "png": ("PNG", "RGB", {}),
    "png-grey16": ("PNG", "I;16", {}),
    "png-palette": ("PNG", "P", {"transparency": 1}),
    "png-alpha": ("PNG", "RGBA", {}),
    "jpeg": ("JPEG", "RGB", {}),
    "jpeg-progressive": ("JPEG", "RGB", {"progressive": True}),
    "jpeg-cmyk": ("JPEG", "CMYK", {}),
    "webp": ("WEBP", "RGB", {}),
    "webp-lossless": ("WEBP", "RGBA", {"lossless": True}),
    "gif": ("GIF", "P", {}),
    "avif": ("AVIF", "RGB", {"speed": 10}),
    "tiff": ("TIFF", "RGB", {}),
    "tiff-lzw": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "tiff-deflate": ("TIFF", "I;16", {"compression": "tiff_adobe_deflate"}),
    "tiff-jpeg": ("TIFF", "RGB", {"compression": "jpeg"}),
    "tiff-fax": ("TIFF", "1", {"compression": "group4"}),
    "tiff-float": ("TIFF", "F", {}),
    "tiff-whole": ("TIFF", "I", {}),
    "tiff-lab": ("TIFF", "LAB", {}),
    "bmp": ("BMP", "RGB", {}),
    "bmp-palette": ("BMP", "P", {}),
    "tga": ("TGA", "RGB", {"compression": "tga_rle"}),
    "ppm": ("PPM", "RGB", {}),
    "pgm16": ("PPM", "I;16", {}),
    "pfm": ("PPM", "F", {}),
    "jpeg2000": ("JPEG2000", "RGB", {}),
    "jpeg2000-grey16": ("JPEG2000", "I;16", {}),
    "dds": ("DDS", "RGBA", {}),
    "dds-compressed": ("DDS", "RGBA", {"pixel_format": "DXT5"}),
    "ico": ("ICO", "RGBA", {}),
    "ico-bitmap": ("ICO", "RGBA", {"bitmap_format": "bmp"}),
    "sgi": ("SGI", "RGB", {}),
    "qoi": ("QOI", "RGB", {}),
    "pcx": ("PCX", "RGB", {}),
}
"""Name of the sample: Pillow's format, the picture's mode, how it is written."""


def sample(name: str, height: int = 24, width: int = 32) -> bytes:
    """A file of noise, with a profile and EXIF where its format has them."""
    kind, mode, options = WRITTEN[name]
    file = io.BytesIO()
    image = in_mode(mode, height, width)
    beside: dict[str, object] = {}
    if kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF") and mode not in ("CMYK", "LAB", "F", "I", "1"):
        exif = Image.Exif()
        exif[0x0112] = 6
        beside = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), "exif": exif}
    if kind == "ICO":
        image = image.resize((32, 32))
        beside = {"sizes": [(32, 32)]}
    image.save(file, format=kind, **{**beside, **options})
    return file.getvalue()


def in_mode(mode: str, height: int, width: int) -> Image.Image:
    """Noise in one of Pillow's modes."""
    grey = np.random.default_rng(1).integers(0, 65536, (height, width))
    if mode in ("I;16", "I", "F"):
        return Image.fromarray(grey.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    if mode in ("LAB", "CMYK", "RGBA"):
        bands = 3 if mode == "LAB" else 4
        return Image.frombytes(mode, (width, height), noise(height, width, bands).tobytes())
    return Image.fromarray(noise(height, width)).convert(mode)


def psd() -> bytes:
    """A Photoshop document of 4x4 pixels, its one picture uncompressed."""
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3)
    return head + bytes(12) + struct.pack(">H", 0) + noise(3, 16, 1).tobytes()


def samples() -> dict[str, bytes]:
    return {**{name: sample(name) for name in WRITTEN}, "psd": psd()}


def damaged(data: bytes, random: Random) -> bytes:
    """The file with bytes changed, cut out, doubled, cut off, or numbers made absurd."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = min(int(len(changed) ** random.random()), len(changed) - 1)
        way = random.randrange(7)
        if way <= 2:
            changed[at] = random.randrange(256)
        elif way == 3:
            changed[at : at + 4] = random.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\0"))
        elif way == 4:
            del changed[at : at + random.randrange(1, 32)]
        elif way == 5:
            changed[at:at] = changed[at : at + random.randrange(1, 64)]
        else:
            del changed[random.randrange(1, len(changed)) :]
        if len(changed) < 4:
            break
    return bytes(changed)


def absurd(name: str, data: bytes, random: Random) -> bytes:
    """The file with another width and height in its header."""
    sides = [random.choice((0, 1, 3, 4096, 16383, 30000, 65535, 2**24, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
    for place, form in PLACES_OF_SIZE.get(name.split("-")[0], ()):
        most = 256 ** struct.calcsize(form[0] + form[1]) - 1
        struct.pack_into(form[0] + 2 * form[1], (changed := bytearray(data)), place, *(min(s, most) for s in sides))
        data = bytes(changed)
    return data


PLACES_OF_SIZE: Mapping[str, tuple[tuple[int, str], ...]] = {
    "png": ((16, ">I"),), "gif": ((6, "<H"),), "bmp": ((18, "<I"),), "tga": ((12, "<H"),), "dds": ((12, "<I"),),
    "sgi": ((6, ">H"),), "qoi": ((4, ">I"),), "pcx": ((8, "<H"),), "psd": ((14, ">I"),),
}  # fmt: skip


def inputs(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Damaged files and absurd headers: what it was made from, and the file."""
    random = Random(seed)
    files = samples()
    names = sorted(files)
    for index in range(count):
        name = names[index % len(names)]
        way = absurd(name, files[name], random) if random.random() < 0.15 else damaged(files[name], random)
        yield name, way
