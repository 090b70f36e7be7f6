"""Colors are what the picture's profile means; without one, or with sRGB, not a bit changes."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.pictures import noise, pixels, png

from lowmem_bagel.pictures.opening import open_picture

Primaries: TypeAlias = tuple[tuple[float, float], ...]

SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
D65 = (0.3127, 0.3290)
D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def to_pcs(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Linear RGB of these primaries, white D65, to XYZ at D50: the textbook's way."""
    columns = np.stack([xyz(*primary) for primary in primaries], axis=1)
    own = columns * np.linalg.solve(columns, xyz(*D65))
    scale = (BRADFORD @ D50) / (BRADFORD @ xyz(*D65))
    return np.linalg.inv(BRADFORD) @ np.diag(scale) @ BRADFORD @ own


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile, version 2, of a display."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"made\0" + bytes(78),
        b"cprt": b"text\0\0\0\0free\0",
        **tags,
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I", start + len(body)) + bytes(4) + b"\x02\x10\0\0mntr" + space + b"XYZ " + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + b"".join(fixed(v) for v in D50)
    return head.ljust(128, b"\0") + table + body


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def of_xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(fixed(v) for v in values)


def rgb_profile(
    primaries: tuple[tuple[float, float], ...], gamma: float, order: tuple[int, int, int] = (0, 1, 2)
) -> bytes:
    matrix = to_pcs(primaries)
    tags = {b"wtpt": of_xyz(D50)}
    for letter, column in zip((b"r", b"g", b"b"), order, strict=True):
        tags |= {letter + b"XYZ": of_xyz(matrix[:, column]), letter + b"TRC": curve(gamma)}
    return profile(b"RGB ", tags)


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", {b"wtpt": of_xyz(D50), b"kTRC": curve(gamma)})


def encoded(linear: np.ndarray) -> np.ndarray:
    """Linear light as sRGB, from 0 to 255."""
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def meant(values: np.ndarray, primaries: tuple[tuple[float, float], ...], gamma: float) -> np.ndarray:
    linear = (values / 255) ** gamma @ to_pcs(primaries).T
    return encoded(linear @ np.linalg.inv(to_pcs(SRGB)).T)


def soft(height: int = 12, width: int = 16) -> np.ndarray:
    """Colors that stay within sRGB whatever the primaries."""
    return (noise(height, width) // 4 + 90).astype(np.uint8)


def saved(image: Image.Image, kind: str, icc: bytes | None, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, icc_profile=icc, **options)
    return file.getvalue()


LOSSLESS: dict[str, dict[str, Any]] = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize(("primaries", "gamma"), [(DISPLAY_P3, 2.2), (ADOBE_RGB, 2.2), (SRGB, 1.0), (SRGB, 1.8)])
def test_colors_of_another_space(kind: str, primaries: Any, gamma: float) -> None:
    picture = open_picture(saved(Image.fromarray(soft()), kind, rgb_profile(primaries, gamma), **LOSSLESS[kind]))
    assert not picture.notes
    assert np.abs(pixels(picture.image) - meant(soft(), primaries, gamma)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_profile_that_swaps_red_and_green(kind: str) -> None:
    """What every viewer shows red is stored green."""
    image = Image.new("RGB", (32, 32), (0, 255, 0))
    found = open_picture(saved(image, kind, rgb_profile(SRGB, 2.2, (1, 0, 2)))).image
    assert np.abs(pixels(found) - [255, 0, 0]).max() <= 12


def test_jpeg_2000(tmp_path: Any) -> None:
    """Pillow writes no profile: its box is put in by hand."""
    data = saved(Image.new("RGB", (32, 32), (0, 255, 0)), "JPEG2000", None)
    at = data.index(b"colr") - 4
    old = struct.unpack_from(">I", data, at)[0]
    body = b"colr\2\0\0" + rgb_profile(SRGB, 2.2, (1, 0, 2))
    box = struct.pack(">I", len(body) + 4) + body
    outer = data.index(b"jp2h") - 4
    grown = struct.pack(">I", struct.unpack_from(">I", data, outer)[0] + len(box) - old)
    whole = data[:outer] + grown + data[outer + 4 : at] + box + data[at + old :]
    assert np.abs(pixels(open_picture(whole).image) - [255, 0, 0]).max() <= 8


def test_bitmap() -> None:
    """Of version 5, the profile behind the pixels; Pillow writes no such."""
    icc = rgb_profile(SRGB, 2.2, (1, 0, 2))
    pixel_bytes = np.tile(np.array([0, 255, 0], np.uint8), (8, 8, 1)).tobytes()
    head = (
        struct.pack("<IiiHHIIiiII", 124, 8, 8, 1, 24, 0, len(pixel_bytes), 0, 0, 0, 0) + bytes(16) + b"DEBM" + bytes(48)
    )
    head += struct.pack("<IIII", 4, 124 + len(pixel_bytes), len(icc), 0)
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + 124) + head + pixel_bytes + icc
    assert len(head) == 124
    assert np.abs(pixels(open_picture(data).image) - [255, 0, 0]).max() <= 2


def test_alpha_is_kept_and_composited_afterwards() -> None:
    alpha = np.tile(np.array([0, 85, 170, 255], np.uint8), (12, 4))
    data = saved(Image.fromarray(np.dstack([soft(), alpha])), "PNG", rgb_profile(DISPLAY_P3, 2.2))
    share = alpha[..., None] / 255
    wanted = meant(soft(), DISPLAY_P3, 2.2) * share + 255 * (1 - share)
    assert np.abs(pixels(open_picture(data).image) - wanted).max() <= 2


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_greys(mode: str) -> None:
    values = np.arange(64, 256, dtype=np.uint8).reshape(12, 16)
    data = saved(Image.fromarray(values).convert(mode), "PNG", grey_profile(1.0))
    assert np.abs(pixels(open_picture(data).image) - encoded(values / 255)[..., None]).max() <= 2


def test_deep_greys_and_palettes() -> None:
    values = np.arange(64, 256, dtype=np.uint16).reshape(12, 16)
    deep = saved(Image.fromarray(values * 257), "PNG", grey_profile(1.0))
    assert np.abs(pixels(open_picture(deep).image) - encoded(values / 255)[..., None]).max() <= 2
    palette = Image.fromarray((np.arange(192) % 4).astype(np.uint8).reshape(12, 16), "P")
    palette.putpalette(soft(1, 4).tobytes())
    data = saved(palette, "PNG", rgb_profile(ADOBE_RGB, 2.2))
    wanted = meant(soft(1, 4)[0], ADOBE_RGB, 2.2)[np.asarray(palette)]
    assert np.abs(pixels(open_picture(data).image) - wanted).max() <= 2


def test_turned_by_exif_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(soft()), "PNG", rgb_profile(DISPLAY_P3, 2.2), exif=exif)
    wanted = np.rot90(meant(soft(), DISPLAY_P3, 2.2), -1)
    assert np.abs(pixels(open_picture(data).image) - wanted).max() <= 2


def srgb_of_lcms() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("icc", [None, srgb_of_lcms])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_srgb_changes_no_bit(icc: Callable[[], bytes] | None, mode: str) -> None:
    image = Image.fromarray(noise(12, 16, 4)).convert(mode)
    plain = open_picture(image.copy())
    with_profile = open_picture(saved(image, "PNG", icc and icc()))
    assert not with_profile.notes
    assert (pixels(with_profile.image) == pixels(plain.image)).all()


def broken(icc: bytes) -> list[bytes]:
    return [b"", b"x", bytes(200), icc[:100], icc[:-40], icc[:132] + b"\xff" * 60 + icc[192:], b"\0" * 128 + icc[128:]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("which", range(1, 7))
def test_a_broken_profile_is_left_out_of_account(kind: str, which: int) -> None:
    icc = broken(rgb_profile(DISPLAY_P3, 2.2))[which]
    options = LOSSLESS.get(kind, {})
    picture = open_picture(saved(Image.fromarray(soft()), kind, icc, **options))
    wanted = pixels(open_picture(saved(Image.fromarray(soft()), kind, None, **options)).image)
    if picture.notes:
        assert "color profile" in picture.notes[0] and "left out of account" in picture.notes[0]
        assert (pixels(picture.image) == wanted).all()
    else:  # it lacks what is not needed
        assert np.abs(pixels(picture.image) - meant(soft(), DISPLAY_P3, 2.2)).max() <= 12


def test_a_profile_for_other_pictures_is_left_out_of_account() -> None:
    for image, icc in (
        (Image.fromarray(soft()), grey_profile(1.0)),
        (Image.new("CMYK", (8, 8)), rgb_profile(SRGB, 1.0)),
    ):
        picture = open_picture(saved(image, "TIFF", icc))
        assert "left out of account" in picture.notes[0]
        assert (pixels(picture.image) == np.asarray(image.convert("RGB"))).all()


def test_a_caller_keeps_the_picture_as_it_is() -> None:
    image = Image.fromarray(soft())
    image.info["icc_profile"] = rgb_profile(DISPLAY_P3, 2.2)
    found = open_picture(image)
    assert np.abs(pixels(found.image) - meant(soft(), DISPLAY_P3, 2.2)).max() <= 2
    assert (np.asarray(image) == soft()).all()


def test_a_profile_that_is_cut_off_in_a_png() -> None:
    values = noise(7, 10).astype(np.uint16)
    picture = open_picture(png(values, 8, 2, iCCP=b"made\0\0not compressed"))
    assert (pixels(picture.image) == values).all()
    assert "color profile is damaged" in picture.notes[0]


def chromaticities(primaries: Primaries, white: tuple[float, float] = D65) -> bytes:
    return struct.pack(">8I", *(round(v * 100_000) for point in (white, *primaries) for v in point))


def gamma_chunk(gamma: float) -> bytes:
    return struct.pack(">I", round(100_000 / gamma))


class TestSpacesNamedByNumbers:
    @pytest.mark.parametrize(("primaries", "gamma"), [(ADOBE_RGB, 1.8), (DISPLAY_P3, 1.0), (SRGB, 1.4)])
    def test_primaries_and_exponent_of_a_png(self, primaries: Any, gamma: float) -> None:
        values = soft().astype(np.uint16)
        data = png(values, 8, 2, gAMA=gamma_chunk(gamma), cHRM=chromaticities(primaries))
        assert np.abs(pixels(open_picture(data).image) - meant(soft(), primaries, gamma)).max() <= 2

    def test_usual_numbers_change_no_bit(self) -> None:
        values = noise(12, 16).astype(np.uint16)
        for chunks in (
            {"gAMA": gamma_chunk(2.2), "cHRM": chromaticities(SRGB)},
            {"cHRM": chromaticities(ADOBE_RGB)},
            {"gAMA": gamma_chunk(1.0), "cHRM": chromaticities(ADOBE_RGB), "sRGB": b"\0"},
            {"cICP": bytes([1, 13, 0, 1])},
            {"gAMA": gamma_chunk(2.2), "cHRM": bytes(32)},
            {"gAMA": bytes(4), "cHRM": chromaticities(ADOBE_RGB)},
        ):
            picture = open_picture(png(values, 8, 2, **chunks))
            assert (pixels(picture.image) == values).all() and not picture.notes, chunks

    def test_code_points_of_a_png(self) -> None:
        """Display P3, whose curve is sRGB's."""
        linear = np.where(soft() <= 10, soft() / 255 / 12.92, ((soft() / 255 + 0.055) / 1.055) ** 2.4)
        wanted = encoded(linear @ to_pcs(DISPLAY_P3).T @ np.linalg.inv(to_pcs(SRGB)).T)
        data = png(soft().astype(np.uint16), 8, 2, cICP=bytes([12, 13, 0, 1]), iCCP=b"made\0\0junk")
        assert np.abs(pixels(open_picture(data).image) - wanted).max() <= 2

    def test_code_points_of_an_avif(self) -> None:
        plain = saved(Image.fromarray(np.full((32, 32, 3), (60, 200, 90), np.uint8)), "AVIF", None, quality=100)
        at = plain.index(b"colrnclx") + 8
        data = plain[:at] + struct.pack(">H", 12) + plain[at + 2 :]
        before, after = (pixels(open_picture(d).image)[0, 0] for d in (plain, data))
        linear = ((before / 255 + 0.055) / 1.055) ** 2.4
        wanted = encoded(linear @ to_pcs(DISPLAY_P3).T @ np.linalg.inv(to_pcs(SRGB)).T)
        assert np.abs(after - wanted).max() <= 2
        assert np.abs(after - before).max() > 10

    @pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
    def test_light_for_hdr_screens_is_noted(self, transfer: int, name: str) -> None:
        picture = open_picture(png(noise(8, 8).astype(np.uint16), 8, 2, cICP=bytes([9, transfer, 0, 1])))
        assert f"HDR screens ({name})" in picture.notes[0]


def ink_profile() -> bytes:
    """Inks to XYZ by a table of two steps an ink (lut8): cyan is made to be what magenta is."""
    white, black = D50, D50 * 0
    colors = {(0, 0, 0): white, (1, 0, 0): to_pcs(SRGB) @ [1, 0, 1]}
    table = b""
    for index in range(16):
        inks = tuple(index >> bit & 1 for bit in (3, 2, 1, 0))
        value = colors.get(inks[:3], D50 * 0.2) if not inks[3] else black
        table += bytes(round(min(v * 32768 / 65535, 1) * 255) for v in value)
    identity = b"".join(fixed(v) for v in np.eye(3).ravel())
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + table + ramp * 3
    return profile(b"CMYK", {b"wtpt": of_xyz(D50), b"A2B0": lut}).replace(b"mntr", b"prtr", 1)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks(kind: str) -> None:
    """Without the profile cyan is cyan; by it, what it says."""
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.abs(pixels(open_picture(saved(image, kind, None)).image) - [0, 255, 255]).max() <= 3
    picture = open_picture(saved(image, kind, ink_profile()))
    assert not picture.notes
    assert np.abs(pixels(picture.image) - [255, 0, 255]).max() <= 12
