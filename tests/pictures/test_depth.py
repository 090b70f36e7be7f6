"""Depth, range and photometry are the file's: the model gets what a viewer shows, and what was assumed is noted."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.pictures import noise, pixels, png
from support.tiff_files import tiff

from lowmem_bagel.errors import ImageError
from lowmem_bagel.pictures.opening import open_picture


def shown(source: Any, noted: str = "") -> np.ndarray:
    """The pixels; what is noted has to be as said."""
    picture = open_picture(source)
    assert (noted in " ".join(picture.notes)) if noted else not picture.notes, picture.notes
    return pixels(picture.image)


def ramp(white: int, dtype: Any, samples: int = 1) -> np.ndarray:
    """Values [7, 10] or [7, 10, samples] from 0 to white."""
    values = np.linspace(0, white, 70 * samples).round().astype(dtype)
    return values.reshape((7, 10, samples) if samples > 1 else (7, 10))


def close(found: np.ndarray, wanted: np.ndarray, by: float = 1.0) -> bool:
    wanted = wanted[..., None] if wanted.ndim == 2 else wanted
    return bool(np.abs(found - wanted.astype(float)).max() <= by)


class TestTiff:
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize(
        "layout", [{}, {"deflated": True}, {"deflated": True, "predictor": 2}, {"rows": 2}, {"big": True}]
    )
    def test_sixteen_bit_grey(self, order: str, layout: dict[str, Any]) -> None:
        values = ramp(65535, np.uint16)
        assert close(shown(tiff(values, order=order, **layout)), values / 257)

    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("bits", [8, 16, 32])
    def test_white_is_zero(self, order: str, bits: int) -> None:
        white = 2**bits - 1
        values = ramp(white, f"u{bits // 8}")
        found = shown(tiff(values, 0, order=order), "range is not said" if bits == 32 else "")
        assert close(found, 255 - values / (white / 255))

    def test_twelve_bits(self) -> None:
        values = ramp(4095, np.uint16)
        assert close(shown(tiff(values, bits=12)), values / 4095 * 255)

    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("planes", [False, True])
    @pytest.mark.parametrize("layout", [{}, {"tile": (16, 16)}, {"rows": 3}, {"deflated": True, "predictor": 2}])
    @pytest.mark.parametrize("bits", [8, 16])
    def test_colors_in_planes_and_tiles(self, order: str, planes: bool, layout: dict[str, Any], bits: int) -> None:
        values = ramp(2**bits - 1, f"u{bits // 8}", 3)
        assert close(shown(tiff(values, 2, order=order, planes=planes, **layout)), values / (257 if bits == 16 else 1))

    @pytest.mark.parametrize("layout", [{}, {"deflated": True, "predictor": 3}, {"planes": True}, {"tile": (16, 16)}])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_floats_in_colors(self, layout: dict[str, Any], dtype: Any, order: str) -> None:
        values = (ramp(1000, np.int32, 3) / 1000).astype(dtype)
        assert close(shown(tiff(values, 2, order=order, **layout), "white 1"), values.astype(float) * 255)

    @pytest.mark.parametrize(
        ("values", "black", "white"),
        [
            (ramp(255, np.float32), 0, 255),
            (ramp(200, np.float32) / np.float32(200), 0, 1),
            (ramp(40000, np.float32), 0, 65535),
            (ramp(1000, np.float32) - 500, -500, 500),
            (ramp(1000, np.float32) * 1e6, 0, 1e9),
            (ramp(200, np.int32), 0, 255),
            (ramp(60000, np.uint32), 0, 65535),
            (ramp(2**32 - 1, np.uint32), 0, 2**32 - 1),
            (ramp(30000, np.int16), 0, 65535),
            (ramp(30000, np.int16) - np.int16(20000), -20000, 10000),
        ],
    )
    def test_a_range_that_is_not_said_is_assumed_and_noted(
        self, values: np.ndarray, black: float, white: float
    ) -> None:
        found = shown(tiff(values), f"black was taken to be {black:g} and white {white:g}")
        assert close(found, (values.astype(float) - black) / (white - black) * 255)

    @pytest.mark.parametrize("dtype", [np.float32, np.uint32, np.int16])
    @pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_deflate", "lzma", "zstd"])
    def test_deep_colors_in_every_lossless_compression(self, dtype: Any, compression: str) -> None:
        """Pillow compresses their bytes as a grey picture; the tags are then made to say what they are."""
        values = ramp(20000, dtype, 3)
        file = io.BytesIO()
        grey = Image.fromarray(np.ascontiguousarray(values).view(np.uint8).reshape(7, -1))
        grey.save(file, "TIFF", compression=compression)
        tags = Image.open(io.BytesIO(file.getvalue())).tag_v2
        start, count, coding = tags[273][0], tags[279][0], tags[259]
        strip = file.getvalue()[start : start + count]
        data = tiff(values, 2, contents=[strip], others={259: (coding,)})
        assert close(shown(data, "white 65535"), values / 257)

    def test_what_is_cut_off_is_refused(self) -> None:
        whole = tiff(ramp(1000, np.float32, 3), 2, rows=2)
        offsets = whole.index(struct.pack("<HHI", 273, 4, 4)) + 8
        place = struct.unpack_from("<I", whole, offsets)[0]
        data = whole[: place + 12] + struct.pack("<I", len(whole) + 1000) + whole[place + 16 :]
        with pytest.raises(ImageError, match="damaged or truncated"):
            open_picture(data)

    def test_numbers_that_are_none(self) -> None:
        values = np.array([[0, np.nan, np.inf], [1, 0.5, -np.inf]], np.float32)
        assert close(shown(tiff(values), "white 1"), np.array([[0, 0, 255], [255, 127.5, 0]]))

    def test_grey_of_sixteen_bits_with_alpha(self) -> None:
        values = ramp(65535, np.uint16, 2)
        alpha = values[..., 1] / 65535
        found = shown(tiff(values, extra=(2,)))
        assert close(found, values[..., 0] / 257 * alpha + 255 * (1 - alpha), 2)

    def test_colors_that_alpha_was_multiplied_into(self) -> None:
        """Shown on white they are what is stored, and white for what is missing."""
        alpha = ramp(255, np.uint8)
        values = np.dstack([(noise(7, 10) * (alpha[..., None] / 255)).astype(np.uint8), alpha])
        assert close(shown(tiff(values, 2, extra=(1,))), values[..., :3] + 255.0 - alpha[..., None], 3)

    def test_signed_bytes_and_inks_of_sixteen_bits(self) -> None:
        assert close(shown(tiff(ramp(100, np.int8)), "white 255"), ramp(100, np.uint8))
        inks = ramp(65535, np.uint16, 4)
        wanted = (255 - inks[..., :3] / 257) * (255 - inks[..., 3:] / 257) / 255
        assert close(shown(tiff(inks, 5)), wanted, 3)
        assert close(shown(tiff(inks, 5, planes=True)), wanted, 3)

    @pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
    @pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "P"])
    def test_as_pillow_writes_them(self, compression: str | None, mode: str) -> None:
        grey = np.asarray(Image.fromarray(noise(7, 10)).convert("L"))
        image = (
            Image.fromarray(grey.astype(np.uint16) * 257)
            if mode == "I;16"
            else Image.fromarray(noise(7, 10)).convert(mode)
        )
        file = io.BytesIO()
        image.save(file, "TIFF", compression=compression)
        wanted = grey if mode == "I;16" else np.asarray(image.convert("RGB"))
        assert close(shown(file.getvalue()), wanted, 0 if mode != "YCbCr" else 4)

    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("layout", [{}, {"deflated": True}, {"rows": 4}])
    @pytest.mark.parametrize(("across", "down"), [(1, 1), (2, 1), (2, 2), (4, 1)])
    def test_luma_and_shared_chroma(self, order: str, layout: dict[str, Any], across: int, down: int) -> None:
        luma = noise(8, 12, 1)
        chroma = noise(8 // down, 12 // across, 2, seed=1) // 4 + 96
        units = luma.reshape(8 // down, down, 12 // across, across).transpose(0, 2, 1, 3).reshape(*chroma.shape[:2], -1)
        stored = np.dstack([units, chroma])
        rows = layout.get("rows", 8)
        strips = [stored[top : top + rows // down].tobytes() for top in range(0, 8 // down, rows // down)]
        data = tiff(
            np.zeros((8, 12, 3), np.uint8), 6, order=order, contents=strips, others={530: (across, down)}, **layout
        )
        whole = np.dstack([luma, chroma.repeat(down, axis=0).repeat(across, axis=1)])
        wanted = Image.frombytes("YCbCr", (12, 8), whole.tobytes()).convert("RGB")
        assert close(shown(data), np.asarray(wanted), 0)

    @pytest.mark.parametrize("scale", [1, 257])
    def test_palettes_of_eight_and_sixteen_bits(self, scale: int) -> None:
        colors, indices = noise(4, 1)[:, 0], noise(6, 9, 1) % 4
        table = np.zeros((3, 256), int)
        table[:, :4] = colors.T.astype(int) * scale
        found = shown(tiff(indices, 3, others={320: tuple(table.ravel().tolist())}))
        assert close(found, colors[indices], 0)

    def test_what_cannot_be_read_is_refused_in_words(self) -> None:
        odd = tiff(ramp(1, np.float32, 3), 2, others={259: (7,)})
        with pytest.raises(ImageError, match=r"samples of 32 bits \(3 a pixel, floats\) are not read; save it with 8"):
            open_picture(odd)

    def test_lab(self) -> None:
        """By the definition of CIE Lab, its white that of profiles (D50)."""
        lab = np.array([[[100, 0, 0], [53, 80, 67]], [[0, 0, 0], [50, 0, 0]]])
        stored = np.dstack([(lab[..., 0] * 2.55).round(), lab[..., 1], lab[..., 2]]).astype(np.int16)
        file = tiff(stored.astype(np.uint8), 8, others={339: (1, 1, 1)})
        wanted = [[[255, 255, 255], [255, 0, 0]], [[0, 0, 0], [119, 119, 119]]]
        assert close(shown(file), np.array(wanted), 12)


class TestPng:
    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_greys_of_every_depth(self, bits: int) -> None:
        values = ramp(2**bits - 1, np.uint16)
        assert close(shown(png(values, bits, 0)), values / (2**bits - 1) * 255)

    @pytest.mark.parametrize(("color", "samples"), [(2, 3), (4, 2), (6, 4)])
    @pytest.mark.parametrize("bits", [8, 16])
    def test_colors_and_alpha_of_every_depth(self, color: int, samples: int, bits: int) -> None:
        values = ramp(2**bits - 1, np.uint16, samples)
        scaled = values / (2**bits - 1)
        alpha = scaled[..., -1:] if samples in (2, 4) else np.ones((7, 10, 1))
        colors = scaled[..., :-1] if samples in (2, 4) else scaled
        assert close(shown(png(values, bits, color)), 255 * (colors * alpha + 1 - alpha), 2)

    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_a_grey_named_as_transparent(self, bits: int) -> None:
        values = ramp(2**bits - 1, np.uint16)
        named = int(values[0, 1])
        wanted = np.where(values == named, 255, values / (2**bits - 1) * 255)
        found = shown(png(values, bits, 0, tRNS=struct.pack(">H", named)), "all one color" if bits == 1 else "")
        assert close(found, wanted)

    @pytest.mark.parametrize("bits", [8, 16])
    def test_a_color_named_as_transparent(self, bits: int) -> None:
        values = ramp(2**bits - 1, np.uint16, 3)
        wanted = values / (2**bits - 1) * 255
        wanted[2, 3] = 255
        assert close(shown(png(values, bits, 2, tRNS=struct.pack(">3H", *values[2, 3].tolist()))), wanted)

    def test_another_exponent(self) -> None:
        """Linear samples, as the gAMA chunk says: half the light is 188 in sRGB."""
        values = np.full((4, 4), 128, np.uint16)
        values[0] = 0
        assert set(np.unique(shown(png(values, 8, 0, gAMA=struct.pack(">I", 100_000))))) == {0, 188}
        for usual in ({"gAMA": struct.pack(">I", 45_455)}, {"gAMA": struct.pack(">I", 100_000), "sRGB": b"\0"}):
            assert set(np.unique(shown(png(values, 8, 0, **usual)))) == {0, 128}


class TestNetpbm:
    @pytest.mark.parametrize(
        ("content", "wanted"),
        [
            (b"P1\n# said\n3 2\n101\n0 1 0", [[0, 255, 0], [255, 0, 255]]),
            (b"P4 3 2\n" + bytes([0b10100000, 0b01000000]), [[0, 255, 0], [255, 0, 255]]),
            (b"P2 3 2 15\n0 15 3 # a row\n5 10 1", [[0, 255, 51], [85, 170, 17]]),
            (b"P5 3 2 100 " + bytes([0, 100, 20, 40, 60, 80]), [[0, 255, 51], [102, 153, 204]]),
            (b"P5 3 2 65535 " + struct.pack(">6H", 0, 65535, 257, 514, 771, 1028), [[0, 255, 1], [2, 3, 4]]),
            (b"P5 3 2 4095 " + struct.pack(">6H", 0, 4095, 819, 273, 1, 2048), [[0, 255, 51], [17, 0, 128]]),
        ],
    )
    def test_greys(self, content: bytes, wanted: list[list[int]]) -> None:
        assert close(shown(content), np.array(wanted), 0)

    @pytest.mark.parametrize(("head", "form"), [(b"P6 5 4 255\n", "u1"), (b"P6 5 4 65535\n", ">u2")])
    def test_colors(self, head: bytes, form: str) -> None:
        values = noise(4, 5)
        stored = values.astype(form) * (257 if form == ">u2" else 1)
        assert close(shown(head + stored.astype(form).tobytes()), values, 0)
        digits = " ".join(map(str, values.ravel())).encode()
        assert close(shown(b"P3 5 4 255\n" + digits), values, 0)

    @pytest.mark.parametrize(("scale", "form"), [(b"-1.0", "<f4"), (b"1.0", ">f4")])
    @pytest.mark.parametrize("kind", [b"Pf", b"PF"])
    def test_floats(self, scale: bytes, form: str, kind: bytes) -> None:
        values = noise(4, 5, 3 if kind == b"PF" else 1) / np.float32(255)
        content = kind + b"\n5 4\n" + scale + b"\n" + values[::-1].astype(form).tobytes()
        assert close(shown(content, "white 1"), values * 255)

    @pytest.mark.parametrize(
        "content", [b"P5 3 2 255\n" + bytes(5), b"P2 2 2 9\n1 2 x 4", b"P2 2 2 9\n1 2", b"P5 3", b"P5 3 2 0 "]
    )
    def test_damage(self, content: bytes) -> None:
        with pytest.raises(ImageError, match="damaged"):
            open_picture(content)


class TestOthers:
    @pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
    def test_jpeg2000_of_eight_bits(self, mode: str) -> None:
        image = Image.fromarray(noise(16, 20, {"L": 1, "RGB": 3, "RGBA": 4}[mode]))
        file = io.BytesIO()
        image.save(file, "JPEG2000")
        assert close(shown(file.getvalue()), pixels(open_picture(image).image))

    def test_jpeg2000_of_sixteen_bits(self) -> None:
        values = ramp(65535, np.uint16)
        file = io.BytesIO()
        Image.fromarray(values).save(file, "JPEG2000")
        assert close(shown(file.getvalue()), values / 257)

    def test_jpeg_of_inks_as_adobe_stores_them(self) -> None:
        """Upside down: Pillow writes them so, and a reader that forgets it shows the negative."""
        ink = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
        file = io.BytesIO()
        ink.save(file, "JPEG", quality=95)
        assert close(shown(file.getvalue()), np.array([[[255, 0, 0]]]), 3)

    @pytest.mark.parametrize(("mode", "dtype"), [("I", np.int32), ("F", np.float32), ("I;16", np.uint16)])
    def test_deep_greys_in_memory(self, mode: str, dtype: Any) -> None:
        image = Image.fromarray(ramp(65535, dtype))
        assert image.mode == mode
        assert close(pixels(open_picture(image).image), ramp(65535, np.uint16) / 257)

    @pytest.mark.parametrize("mode", ["YCbCr", "HSV", "CMYK", "RGBX", "RGBa", "PA", "La", "1"])
    def test_rarer_modes_in_memory(self, mode: str) -> None:
        start = Image.fromarray(noise(7, 10))
        image = start.convert({"RGBa": "RGBA", "PA": "RGBA", "La": "LA"}.get(mode, "RGB")).convert(mode)
        wanted = start.convert("L").convert("RGB") if mode == "La" else image.convert("RGB")
        assert close(pixels(open_picture(image).image), np.asarray(wanted, float), 0)


class TestFlattening:
    def test_alpha_that_hides_everything_is_noted(self) -> None:
        hidden = np.dstack([noise(8, 8), np.zeros((8, 8), np.uint8)])
        assert open_picture(Image.fromarray(hidden)).notes == (
            "the picture: what it holds differs from place to place, but what is seen of it is all one color (#ffffff)",
        )

    def test_white_on_nothing_is_noted(self) -> None:
        logo = np.full((8, 8, 4), 255, np.uint8)
        logo[2:6, 2:6, 3] = 0
        assert "all one color (#ffffff)" in open_picture(Image.fromarray(logo)).notes[0]

    def test_small_values_in_a_wide_range_are_noted(self) -> None:
        values = np.arange(64, dtype=np.uint16).reshape(8, 8)
        assert "all one color (#000000)" in open_picture(png(values, 16, 0)).notes[0]

    def test_a_picture_of_one_color_is_no_news(self) -> None:
        assert not open_picture(Image.new("RGBA", (8, 8), (0, 255, 0, 100))).notes
        assert not open_picture(tiff(np.full((8, 8), 700, np.uint16))).notes
