"""Saved pictures remember their making, in the place that each format has, and are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from support.pictures import file_size_limit, noise, one_bit_png, pixels

from lowmem_bagel.errors import ImageError, OutputError
from lowmem_bagel.pictures.saving import read_metadata, save_picture

METADATA = {"prompt": "ein Kreis, 圆 \n", "seed": 0, "cfg_interval": [0.4, 1.0]}


class TestSaving:
    def test_metadata_comes_back(self, tmp_path: Path) -> None:
        path = save_picture(Image.fromarray(noise()), tmp_path / "a.png", METADATA)
        assert read_metadata(path) == METADATA
        with Image.open(path) as image:
            assert image.text["Description"] == METADATA["prompt"]
            assert (pixels(image) == noise()).all()
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

    def test_full_disk_leaves_what_was_there(self, tmp_path: Path) -> None:
        save_picture(Image.fromarray(noise()), tmp_path / "a.png", {"seed": 1})
        with file_size_limit(2000), pytest.raises(OutputError, match=r"cannot write .*a\.png"):
            save_picture(Image.fromarray(noise(200, 200)), tmp_path / "a.png", {"seed": 2})
        assert read_metadata(tmp_path / "a.png") == {"seed": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

    @pytest.mark.parametrize("name", ["missing/a.png", "file/a.png", "x" * 300 + ".png", "folder"])
    def test_impossible_places(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").write_text("in the way")
        (tmp_path / "folder").mkdir()
        with pytest.raises(OutputError, match=r"choose another place"):
            save_picture(Image.fromarray(noise()), tmp_path / name, {})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]

    def test_devices_are_left_alone(self) -> None:
        with pytest.raises(OutputError, match="not an ordinary file"):
            save_picture(Image.fromarray(noise()), "/dev/full", {})
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
        with pytest.raises(ImageError, match="carries no lowmem-bagel settings"):
            read_metadata(one_bit_png(tmp_path / "a.png", 20000, 20000))
