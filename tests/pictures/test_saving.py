"""Saved pictures remember their making, in the place that each format has, and are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.picture_files import damaged
from support.pictures import file_size_limit, noise, one_bit_png, pixels

from lowmem_bagel.errors import ImageError, OutputError
from lowmem_bagel.pictures.opening import open_picture
from lowmem_bagel.pictures.saving import picture_bytes, read_metadata, save_picture

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

    def test_devices_and_odd_paths(self) -> None:
        for path in (None, 3, "nul\0l.png", "~nobody-of-this-name/a.png", "", "."):
            with pytest.raises(OutputError):
                save_picture(Image.fromarray(noise()), path, {})  # type: ignore[arg-type]


KINDS = {"a.png": "PNG", "a.PNG": "PNG", "a": "PNG", "a.jpg": "JPEG", "a.JPEG": "JPEG", "a.webp": "WEBP"}


class TestFormats:
    @pytest.mark.parametrize("name", KINDS)
    @pytest.mark.parametrize("metadata", [METADATA, {"seed": 2**64 - 1, "prompt": "x" * 20_000, "notes": ["\x1b[2J"]}])
    def test_every_format_keeps_the_settings(self, tmp_path: Path, name: str, metadata: dict[str, Any]) -> None:
        path = save_picture(Image.fromarray(noise(40, 60)), tmp_path / name, metadata)
        assert read_metadata(path) == metadata
        with Image.open(path) as image:
            assert image.format == KINDS[name]
            assert (pixels(image) == noise(40, 60)).all() or KINDS[name] == "JPEG"
        assert [p.name for p in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("size", [(1, 1), (1, 37), (40, 1), (41, 60)])
    def test_a_png_for_who_waits_holds_the_same(self, tmp_path: Path, size: tuple[int, int]) -> None:
        (tmp_path / "a.png").write_bytes(picture_bytes(Image.fromarray(noise(*size)), ".png", METADATA))
        assert read_metadata(tmp_path / "a.png") == METADATA
        with Image.open(tmp_path / "a.png") as image:
            image.verify()
        with Image.open(tmp_path / "a.png") as image:
            assert image.mode == "RGB" and (pixels(image) == noise(*size)).all()
            assert image.text["Description"] == METADATA["prompt"]

    def test_a_png_for_who_waits_is_small_where_pictures_are_smooth(self) -> None:
        across, down = np.meshgrid(np.linspace(0, 255, 256), np.linspace(0, 255, 256))
        smooth = np.dstack([across, down, (across + down) / 2]).astype(np.uint8)
        assert len(picture_bytes(Image.fromarray(smooth), ".png", {})) < smooth.size / 4
        assert len(picture_bytes(Image.new("RGB", (256, 256)), ".png", {})) < 4000

    @pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
    def test_settings_stand_where_others_look_for_comments(self, tmp_path: Path, name: str) -> None:
        path = save_picture(Image.fromarray(noise(40, 60)), tmp_path / name, METADATA)
        with Image.open(path) as image:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment.startswith(b"ASCII\0\0\0lowmem-bagel: ")
        assert json.loads(comment.partition(b": ")[2]) == METADATA

    def test_a_jpeg_looks_like_the_picture(self, tmp_path: Path) -> None:
        smooth = np.dstack([np.tile(np.linspace(0, 255, 64), (64, 1))] * 3).astype(np.uint8)
        path = save_picture(Image.fromarray(smooth), tmp_path / "a.jpg", {})
        with Image.open(path) as image:
            assert np.abs(pixels(image) - smooth).max() <= 4

    @pytest.mark.parametrize("name", ["a.gif", "a.tiff", "a.jpg2", "a.png.bak"])
    def test_another_suffix_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(OutputError, match=r"PNG, JPEG or WebP; call it a.*\.png, .*\.jpg or .*\.webp"):
            save_picture(Image.fromarray(noise()), tmp_path / name, {})
        assert not [*tmp_path.iterdir()]

    def test_a_prompt_that_a_jpeg_has_no_room_for(self, tmp_path: Path) -> None:
        metadata = {"prompt": "x" * 70_000}
        with pytest.raises(OutputError, match=r"a JPEG has no room for .* save it as PNG or WebP"):
            save_picture(Image.fromarray(noise()), tmp_path / "a.jpg", metadata)
        assert not [*tmp_path.iterdir()]
        assert read_metadata(save_picture(Image.fromarray(noise()), tmp_path / "a.webp", metadata)) == metadata

    @pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
    def test_damage_to_the_settings_is_ours_to_refuse(self, tmp_path: Path, name: str) -> None:
        whole = save_picture(Image.fromarray(noise()), tmp_path / name, METADATA).read_bytes()
        random = Random(0)
        for _ in range(200):
            (tmp_path / name).write_bytes(damaged(whole, random))
            with contextlib.suppress(ImageError):
                assert isinstance(read_metadata(tmp_path / name), dict)

    def test_a_picture_saved_anew_is_read_with_its_settings_left_aside(self, tmp_path: Path) -> None:
        path = save_picture(Image.fromarray(noise()), tmp_path / "a.png", METADATA)
        assert (pixels(open_picture(path).image) == noise()).all()


def test_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    """The last one wins whole, and nobody fails."""
    begin = threading.Barrier(8)

    def save(number: int) -> None:
        begin.wait()
        for name in ("a.png", "a.jpg", "a.webp"):
            save_picture(Image.fromarray(noise(seed=number)), tmp_path / name, {"seed": number})

    for _ in range(5):
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(save, range(8)))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jpg", "a.png", "a.webp"]
        seed = read_metadata(tmp_path / "a.png")["seed"]
        assert (pixels(open_picture(tmp_path / "a.png").image) == noise(seed=seed)).all()
