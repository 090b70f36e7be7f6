"""HEIC comes through an extra; without it the refusal names it."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.pictures import pixels

from lowmem_bagel.errors import ImageError, MissingExtraError
from lowmem_bagel.pictures.opening import open_picture

BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"hevc")


def gradient() -> np.ndarray:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    return np.dstack([np.tile(ramp, (48, 1)), np.tile(ramp[:48, None], (1, 64)), np.full((48, 64), 90, np.uint8)])


def heic(mode: str = "RGB", **options: object) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(gradient()).convert(mode)).save(file, quality=95, chroma=444, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_pixels(mode: str) -> None:
    wanted = np.asarray(Image.fromarray(gradient()).convert(mode).convert("RGB"), int)
    assert np.abs(pixels(open_picture(heic(mode)).image) - wanted).max() <= 12


def test_orientation_and_profile() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = pixels(open_picture(heic(exif=exif.tobytes(), icc_profile=icc)).image)
    assert np.abs(found - np.rot90(gradient().astype(int), -1)).max() <= 12


def test_damage() -> None:
    data = heic()
    for cut in (20, 100, len(data) // 2, len(data) - 5):
        with pytest.raises(ImageError):
            open_picture(data[:cut])


@pytest.mark.parametrize("brand", BRANDS)
def test_without_the_extra(brand: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + brand + b"mif1"
    with pytest.raises(MissingExtraError, match=r"needs an extra: pip install 'lowmem-bagel\[heif\]'"):
        open_picture(data.ljust(100, b"\0"))
