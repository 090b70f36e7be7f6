"""Any picture a person has comes in with the right pixels; what cannot be used is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.pictures import noise, one_bit_png, pixels

from lowmem_bagel.errors import ImageError
from lowmem_bagel.pictures.opening import open_picture


def opened(source: Any) -> Image.Image:
    return open_picture(source).image


class TestOpening:
    def test_rgb_is_unchanged(self, tmp_path: Path) -> None:
        values = noise()
        Image.fromarray(values).save(tmp_path / "a.png")
        assert (pixels(opened(tmp_path / "a.png")) == values).all()
        assert (pixels(opened(str(tmp_path / "a.png"))) == values).all()
        assert (pixels(opened(Image.fromarray(values))) == values).all()

    def test_palette(self, tmp_path: Path) -> None:
        colours, indices = noise(4, 1)[:, 0], noise(6, 9, 1) % 4
        image = Image.fromarray(indices, "P")
        image.putpalette(colours.tobytes())
        image.save(tmp_path / "a.png")
        assert (pixels(opened(tmp_path / "a.png")) == colours[indices]).all()

    def test_palette_with_a_transparent_colour(self, tmp_path: Path) -> None:
        colours, indices = noise(4, 1)[:, 0], noise(6, 9, 1) % 4
        image = Image.fromarray(indices, "P")
        image.putpalette(colours.tobytes())
        image.save(tmp_path / "a.png", transparency=2)
        wanted = np.where((indices == 2)[..., None], 255, colours[indices])
        assert (pixels(opened(tmp_path / "a.png")) == wanted).all()

    def test_alpha_is_composited_on_white(self, tmp_path: Path) -> None:
        values = noise(channels=4)
        Image.fromarray(values).save(tmp_path / "a.png")
        alpha = values[..., 3:] / 255
        wanted = values[..., :3] * alpha + 255 * (1 - alpha)
        assert np.abs(pixels(opened(tmp_path / "a.png")) - wanted).max() <= 1

    def test_grey_with_alpha(self, tmp_path: Path) -> None:
        values = noise(channels=2)
        Image.fromarray(values, "LA").save(tmp_path / "a.png")
        alpha = values[..., 1] / 255
        wanted = values[..., 0] * alpha + 255 * (1 - alpha)
        assert np.abs(pixels(opened(tmp_path / "a.png")) - wanted[..., None]).max() <= 1

    def test_sixteen_bit_grey_is_scaled_not_clipped(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).integers(0, 65536, (6, 9), dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            assert image.mode.startswith("I")
        wanted = np.round(values / 257.0)
        assert np.abs(pixels(opened(tmp_path / "a.png")) - wanted[..., None]).max() <= 1

    def test_float_grey_with_missing_values(self, tmp_path: Path) -> None:
        values = np.array([[0.0, 51.0], [255.0, np.nan]], dtype=np.float32)
        Image.fromarray(values).save(tmp_path / "a.tiff")
        assert pixels(opened(tmp_path / "a.tiff"))[..., 0].tolist() == [[0, 51], [255, 0]]

    def test_one_bit(self, tmp_path: Path) -> None:
        values = noise(channels=1) > 127
        Image.fromarray(values).save(tmp_path / "a.png")
        assert (pixels(opened(tmp_path / "a.png")) == values[..., None] * 255).all()

    def test_cmyk(self, tmp_path: Path) -> None:
        """Full ink of one colour takes that colour's complement away; full black leaves nothing."""
        ink = np.zeros((4, 4, 4), dtype=np.uint8)
        ink[0, :, 0], ink[1, :, 1], ink[2, :, 2], ink[3, :, 3] = 255, 255, 255, 255
        Image.fromarray(ink, "CMYK").save(tmp_path / "a.tiff")
        with Image.open(tmp_path / "a.tiff") as image:
            assert image.mode == "CMYK"
        wanted = [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
        assert pixels(opened(tmp_path / "a.tiff"))[:, 0].tolist() == wanted

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_rotation(self, tmp_path: Path, orientation: int) -> None:
        """The eight orientations of the EXIF standard, as what brings the stored picture upright."""
        values = noise()
        upright = {
            1: values,
            2: values[:, ::-1],
            3: values[::-1, ::-1],
            4: values[::-1],
            5: values.transpose(1, 0, 2),
            6: np.rot90(values, -1),
            7: np.rot90(values.transpose(1, 0, 2), 2),
            8: np.rot90(values),
        }[orientation]
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "a.png"
        Image.fromarray(values).save(path, exif=exif)
        assert (pixels(opened(path)) == upright).all()
        with Image.open(path) as image:
            assert (pixels(opened(image)) == upright).all()

    def test_first_frame_of_an_animation(self, tmp_path: Path) -> None:
        first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
        first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
        assert pixels(opened(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


class TestRefusals:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="no such picture"):
            opened(tmp_path / "a.png")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="cannot be read"):
            opened(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
    def test_not_a_picture(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ImageError, match=r"not a picture|damaged"):
            opened(tmp_path / "a.png")

    @pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
    def test_truncated(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / f"a.{kind}"
        Image.fromarray(noise(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ImageError, match=r"damaged or truncated|not a picture"):
            opened(path)

    def test_truncated_and_opened_by_the_caller(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        Image.fromarray(noise(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with Image.open(path) as image, pytest.raises(ImageError, match="damaged or truncated"):
            opened(image)

    @pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
    def test_too_small(self, size: tuple[int, int]) -> None:
        with pytest.raises(ImageError, match="too small"):
            opened(Image.new("RGB", size))

    @pytest.mark.parametrize("size", [(20000, 20000), (10000, 18000)])
    def test_too_large_is_refused_unread(self, tmp_path: Path, size: tuple[int, int]) -> None:
        with pytest.raises(ImageError, match="too large; scale it down to 141 megapixels"):
            opened(one_bit_png(tmp_path / "a.png", *size))

    def test_large_and_usable(self, tmp_path: Path) -> None:
        image = opened(one_bit_png(tmp_path / "a.png", 9000, 10100))
        assert image.size == (9000, 10100)
