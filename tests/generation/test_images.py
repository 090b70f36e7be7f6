"""Any picture a person has comes in with the right pixels; what cannot be used is refused; PNGs remember."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import file_size_limit, noise, one_bit_png

from lowmem_bagel.checkpoint.config import PUBLISHED_MAX_PIXELS, ResizeRule
from lowmem_bagel.errors import ImageError, OutputError
from lowmem_bagel.generation.images import (
    from_pixels,
    open_image,
    read_metadata,
    save_png,
    to_pixels,
)

VAE_RULE, VIT_RULE = ResizeRule(1024, 512, 16), ResizeRule(980, 224, 14)


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image, dtype=int)


class TestOpening:
    def test_rgb_is_unchanged(self, tmp_path: Path) -> None:
        values = noise()
        Image.fromarray(values).save(tmp_path / "a.png")
        assert (pixels(open_image(tmp_path / "a.png")) == values).all()
        assert (pixels(open_image(str(tmp_path / "a.png"))) == values).all()
        assert (pixels(open_image(Image.fromarray(values))) == values).all()

    def test_palette(self, tmp_path: Path) -> None:
        colours, indices = noise(4, 1)[:, 0], noise(6, 9, 1) % 4
        image = Image.fromarray(indices, "P")
        image.putpalette(colours.tobytes())
        image.save(tmp_path / "a.png")
        assert (pixels(open_image(tmp_path / "a.png")) == colours[indices]).all()

    def test_palette_with_a_transparent_colour(self, tmp_path: Path) -> None:
        colours, indices = noise(4, 1)[:, 0], noise(6, 9, 1) % 4
        image = Image.fromarray(indices, "P")
        image.putpalette(colours.tobytes())
        image.save(tmp_path / "a.png", transparency=2)
        wanted = np.where((indices == 2)[..., None], 255, colours[indices])
        assert (pixels(open_image(tmp_path / "a.png")) == wanted).all()

    def test_alpha_is_composited_on_white(self, tmp_path: Path) -> None:
        values = noise(channels=4)
        Image.fromarray(values).save(tmp_path / "a.png")
        alpha = values[..., 3:] / 255
        wanted = values[..., :3] * alpha + 255 * (1 - alpha)
        assert np.abs(pixels(open_image(tmp_path / "a.png")) - wanted).max() <= 1

    def test_grey_with_alpha(self, tmp_path: Path) -> None:
        values = noise(channels=2)
        Image.fromarray(values, "LA").save(tmp_path / "a.png")
        alpha = values[..., 1] / 255
        wanted = values[..., 0] * alpha + 255 * (1 - alpha)
        assert np.abs(pixels(open_image(tmp_path / "a.png")) - wanted[..., None]).max() <= 1

    def test_sixteen_bit_grey_is_scaled_not_clipped(self, tmp_path: Path) -> None:
        values = np.random.default_rng(0).integers(0, 65536, (6, 9), dtype=np.uint16)
        Image.fromarray(values).save(tmp_path / "a.png")
        assert Image.open(tmp_path / "a.png").mode.startswith("I")
        wanted = np.round(values / 257.0)
        assert np.abs(pixels(open_image(tmp_path / "a.png")) - wanted[..., None]).max() <= 1

    def test_float_grey_with_missing_values(self, tmp_path: Path) -> None:
        values = np.array([[0.0, 51.0], [255.0, np.nan]], dtype=np.float32)
        Image.fromarray(values).save(tmp_path / "a.tiff")
        assert pixels(open_image(tmp_path / "a.tiff"))[..., 0].tolist() == [[0, 51], [255, 0]]

    def test_one_bit(self, tmp_path: Path) -> None:
        values = noise(channels=1) > 127
        Image.fromarray(values).save(tmp_path / "a.png")
        assert (pixels(open_image(tmp_path / "a.png")) == values[..., None] * 255).all()

    def test_cmyk(self, tmp_path: Path) -> None:
        """Full ink of one colour takes that colour's complement away; full black leaves nothing."""
        ink = np.zeros((4, 4, 4), dtype=np.uint8)
        ink[0, :, 0], ink[1, :, 1], ink[2, :, 2], ink[3, :, 3] = 255, 255, 255, 255
        Image.fromarray(ink, "CMYK").save(tmp_path / "a.tiff")
        assert Image.open(tmp_path / "a.tiff").mode == "CMYK"
        wanted = [[0, 255, 255], [255, 0, 255], [255, 255, 0], [0, 0, 0]]
        assert pixels(open_image(tmp_path / "a.tiff"))[:, 0].tolist() == wanted

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
        assert (pixels(open_image(path)) == upright).all()
        with Image.open(path) as image:
            assert (pixels(open_image(image)) == upright).all()

    def test_first_frame_of_an_animation(self, tmp_path: Path) -> None:
        first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
        first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
        assert pixels(open_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


class TestRefusals:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="no such picture"):
            open_image(tmp_path / "a.png")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="cannot be read"):
            open_image(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
    def test_not_a_picture(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ImageError, match=r"not a picture|damaged"):
            open_image(tmp_path / "a.png")

    @pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
    def test_truncated(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / f"a.{kind}"
        Image.fromarray(noise(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ImageError, match=r"damaged or truncated|not a picture"):
            open_image(path)

    def test_truncated_and_opened_by_the_caller(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        Image.fromarray(noise(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with Image.open(path) as image, pytest.raises(ImageError, match="damaged or truncated"):
            open_image(image)

    @pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
    def test_too_small(self, size: tuple[int, int]) -> None:
        with pytest.raises(ImageError, match="too small"):
            open_image(Image.new("RGB", size))

    @pytest.mark.parametrize("size", [(20000, 20000), (10000, 18000)])
    def test_too_large_is_refused_unread(self, tmp_path: Path, size: tuple[int, int]) -> None:
        with pytest.raises(ImageError, match="too large; scale it down to 178 megapixels"):
            open_image(one_bit_png(tmp_path / "a.png", *size))

    def test_large_and_usable(self, tmp_path: Path) -> None:
        image = open_image(one_bit_png(tmp_path / "a.png", 9000, 10100))
        assert image.size == (9000, 10100)


class TestResizeRule:
    def test_published_sizes(self) -> None:
        """Worked out by hand from the rule: scale to the limits, round to the stride."""
        assert VAE_RULE.resized(1024, 1024) == (1024, 1024)
        assert VAE_RULE.resized(2048, 1024) == (1024, 512)
        assert VAE_RULE.resized(100, 50) == (1024, 512)
        assert VAE_RULE.resized(640, 480) == (688, 512)  # 682.67 -> 683 -> 43 strides
        assert VIT_RULE.resized(1024, 1024) == (980, 980)

    def test_half_rounds_to_even(self) -> None:
        rule = ResizeRule(1000, 10, 10)
        assert rule.resized(25, 35) == (20, 40)

    def test_many_pixels_shrink_by_the_ratio_itself(self) -> None:
        """min_side forces 4 megapixels; both sides are then multiplied by 1806336 / pixels, not by its root."""
        rule = ResizeRule(4096, 2000, 16)
        width, height = rule.resized(2000, 2000)
        factor = PUBLISHED_MAX_PIXELS / 2000**2
        assert (width, height) == (round(round(2000 * factor) / 16) * 16,) * 2

    @pytest.mark.parametrize("rule", [VAE_RULE, VIT_RULE])
    def test_every_size_fits_the_position_table(self, rule: ResizeRule) -> None:
        generator = np.random.default_rng(1)
        for width, height in np.exp(generator.uniform(np.log(2), np.log(20000), (500, 2))).astype(int).tolist():
            for side in rule.resized(width, height):
                assert side % rule.stride == 0
                assert rule.stride <= side <= rule.max_side


class TestPixels:
    def test_in_and_out(self) -> None:
        values = to_pixels(Image.fromarray(noise()))
        assert values.dtype == torch.float32
        assert values.shape == (3, 6, 9)
        wanted = torch.from_numpy(noise()).permute(2, 0, 1).double() / 127.5 - 1
        assert (values.double() - wanted).abs().max() < 1e-6

    def test_out_clamps_and_truncates(self) -> None:
        values = torch.tensor([-3.0, -1.0, -1 + 1.99 / 127.5, 0.0, 1.0, 7.0]).expand(3, 1, 6)
        assert pixels(from_pixels(values))[0, :, 0].tolist() == [0, 0, 1, 127, 255, 255]


METADATA = {"prompt": "ein Kreis, 圆 \n", "seed": 0, "cfg_interval": [0.4, 1.0]}


class TestSaving:
    def test_metadata_comes_back(self, tmp_path: Path) -> None:
        path = save_png(Image.fromarray(noise()), tmp_path / "a.png", METADATA)
        assert read_metadata(path) == METADATA
        with Image.open(path) as image:
            assert image.text["Description"] == METADATA["prompt"]
            assert (pixels(image) == noise()).all()
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

    def test_full_disk_leaves_what_was_there(self, tmp_path: Path) -> None:
        save_png(Image.fromarray(noise()), tmp_path / "a.png", {"seed": 1})
        with file_size_limit(2000), pytest.raises(OutputError, match=r"cannot write .*a\.png"):
            save_png(Image.fromarray(noise(200, 200)), tmp_path / "a.png", {"seed": 2})
        assert read_metadata(tmp_path / "a.png") == {"seed": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

    @pytest.mark.parametrize("name", ["missing/a.png", "file/a.png", "x" * 300 + ".png", "folder"])
    def test_impossible_places(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").write_text("in the way")
        (tmp_path / "folder").mkdir()
        with pytest.raises(OutputError, match=r"choose another place"):
            save_png(Image.fromarray(noise()), tmp_path / name, {})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]

    def test_devices_are_left_alone(self) -> None:
        with pytest.raises(OutputError, match="not an ordinary file"):
            save_png(Image.fromarray(noise()), "/dev/full", {})
        assert Path("/dev/full").is_char_device()

    def test_pictures_of_others(self, tmp_path: Path) -> None:
        Image.fromarray(noise()).save(tmp_path / "a.png")
        with pytest.raises(ImageError, match="carries no lowmem-bagel settings"):
            read_metadata(tmp_path / "a.png")

    @pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
    def test_damaged_metadata(self, tmp_path: Path, text: str) -> None:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("lowmem-bagel", text)
        Image.fromarray(noise()).save(tmp_path / "a.png", pnginfo=info)
        with pytest.raises(ImageError, match="damaged"):
            read_metadata(tmp_path / "a.png")

    def test_huge_picture_without_metadata(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match="not a readable picture"):
            read_metadata(one_bit_png(tmp_path / "a.png", 20000, 20000))
