"""What callers hand over as a picture works as they mean it, or is refused with what to do."""

from __future__ import annotations

import base64
import io
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import noise, pixels
from support.tiff_files import tiff

from lowmem_bagel.errors import ImageError
from lowmem_bagel.pictures.opening import Picture, open_picture

VALUES = noise(6, 9)


def content() -> bytes:
    file = io.BytesIO()
    Image.fromarray(VALUES).save(file, "PNG")
    return file.getvalue()


def url(data: bytes, head: str = "data:image/png;base64") -> str:
    return f"{head},{base64.b64encode(data).decode()}"


def url_of_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.urlsafe_b64encode(data).decode().rstrip("=")


class NoSeeking:
    """A pipe."""

    def read(self, size: int = -1) -> bytes:
        return content()


class Arrayed:
    """A picture of another library."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return VALUES


class OfPath:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def moved(file: io.BytesIO) -> io.BytesIO:
    file.seek(7)
    return file


WAYS: dict[str, Any] = {
    "bytes": content,
    "bytearray": lambda: bytearray(content()),
    "memoryview": lambda: memoryview(content()),
    "file object": lambda: io.BytesIO(content()),
    "file object, read before": lambda: moved(io.BytesIO(content())),
    "pipe": NoSeeking,
    "data URL": lambda: url(content()),
    "data URL in capitals": lambda: url(content(), "DATA:image/PNG;BASE64"),
    "data URL without padding, for URLs": lambda: url_of_url(content()),
    "data URL in lines": lambda: url(content()).replace("AAAA", "AA%0AAA\n"),
    "data URL in percents": lambda: "data:image/png," + "".join(f"%{b:02x}" for b in content()),
    "PIL": lambda: Image.fromarray(VALUES),
    "PIL, not loaded": lambda: Image.open(io.BytesIO(content())),
    "array": lambda: VALUES,
    "array in another order": lambda: np.asfortranarray(VALUES),
    "array that cannot be written": lambda: np.frombuffer(VALUES.tobytes(), np.uint8).reshape(VALUES.shape),
    "floats": lambda: VALUES / 255,
    "single floats": lambda: (VALUES / 255).astype(np.float32),
    "another library": Arrayed,
    "tensor": lambda: torch.from_numpy(VALUES),
    "tensor of torchvision": lambda: torch.from_numpy(VALUES).permute(2, 0, 1),
    "float tensor": lambda: (torch.from_numpy(VALUES).permute(2, 0, 1) / 255).requires_grad_(),
    "opened": lambda: Picture(Image.fromarray(VALUES)),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_pixels(way: str) -> None:
    assert (pixels(open_picture(WAYS[way]()).image) == VALUES).all()


def test_paths(tmp_path: Path) -> None:
    path = tmp_path / "ä 图.png"
    path.write_bytes(content())
    for way in (path, str(path), OfPath(path)):
        assert (pixels(open_picture(way).image) == VALUES).all()
    with path.open("rb") as file:
        file.read(10)
        assert (pixels(open_picture(file).image) == VALUES).all()
        assert file.tell() == 10


def test_half_floats_and_alpha_and_greys() -> None:
    half = (torch.from_numpy(VALUES) / 255).to(torch.bfloat16)
    assert np.abs(pixels(open_picture(half).image) - VALUES).max() <= 1
    assert (pixels(open_picture(VALUES[..., 0]).image) == VALUES[..., :1]).all()
    assert (pixels(open_picture(VALUES[..., :1]).image) == VALUES[..., :1]).all()
    opaque = np.dstack([VALUES, np.full(VALUES.shape[:2], 255, np.uint8)])
    assert (pixels(open_picture(opaque).image) == VALUES).all()
    assert (pixels(open_picture(torch.from_numpy(VALUES[None, ..., 0])).image) == VALUES[..., :1]).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "the picture is of type NoneType; give a path"),
        (3, "of type int; give a path"),
        ([[1, 2], [3, 4]], "of type list; give a path"),
        (VALUES.transpose(2, 0, 1), r"shape \(3, 6, 9\): give uint8.*; transpose\(1, 2, 0\) brings the channels last"),
        (VALUES[None], r"shape \(1, 6, 9, 3\): .*; give one picture of the batch"),
        (VALUES[..., :2], r"shape \(6, 9, 2\): give uint8"),
        (VALUES[0, 0], r"shape \(3,\): give uint8"),
        (np.float32(1), "give uint8"),
        (VALUES.astype(np.uint16), "array of uint16 .* divide what is brighter"),
        (VALUES > 100, "array of bool"),
        (VALUES.astype(np.float32), r"with values from 0 to 2..: give .*; divide by 255"),
        (VALUES / 255 - 0.5, "with values from -0.5"),
        (VALUES / np.float32("nan"), "with values from nan"),
        (VALUES.astype(object), "array of object"),
        (np.zeros((0, 5, 3), np.uint8), "too small"),
        (np.broadcast_to(np.uint8(0), (20000, 20000, 3)), "too large"),
        (np.broadcast_to(np.float32(0), (20000, 20000)), "too large"),
        (torch.zeros(2, 2, 3, device="meta"), "damaged|cannot"),
        (io.StringIO("text"), "open it in binary mode"),
        (b"", "not a picture"),
        ("data:image/png;base64", "has no comma"),
        ("data:image/png;base64,####", "is not base64"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
        ("data:,", "not a picture"),
        ("", "cannot be read"),
        ("nul\0l.png", "cannot be read"),
        ("\ud800.png", "no such picture|cannot be read"),
        ("x" * 5000, "cannot be read"),
    ],
)  # fmt: skip
def test_refusals(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as refused:
        open_picture(source)
    assert len(str(refused.value)) <= 1010


def test_a_closed_file() -> None:
    file = io.BytesIO(content())
    file.close()
    with pytest.raises(ImageError, match="cannot be read"):
        open_picture(file)


def test_what_is_no_ordinary_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s.png"))
        for path in (tmp_path / "pipe.png", "/dev/zero", "/dev/null", tmp_path / "s.png"):
            with pytest.raises(ImageError, match="not an ordinary file"):
                open_picture(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + bytes(28), "PostScript"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\xd7\xcd\xc6\x9a" + bytes(20), "WMF"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'>", "SVG"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "a video"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"hello", "not a picture in a format that is read"),
    ],
)
def test_what_is_taken_for_a_picture(start: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        open_picture(start.ljust(100, b" "))


def test_an_eps_that_the_caller_opened_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.open(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"))
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ImageError, match="PostScript"):
        open_picture(image)


def test_pillow_is_left_as_it_is() -> None:
    from PIL import ImageFile

    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, dict(Image.OPEN), Image.ID[:]
    for way in WAYS.values():
        open_picture(way())
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, dict(Image.OPEN), Image.ID[:])


def test_a_picture_that_the_caller_opened_is_read_from_its_file() -> None:
    """White is zero, which is lost once Pillow has loaded it; and the caller may still load it."""
    values = np.linspace(0, 65535, 54).round().astype(np.uint16).reshape(6, 9)
    image = Image.open(io.BytesIO(tiff(values, 0)))
    assert np.abs(pixels(open_picture(image).image) - (255 - values / 257)[..., None]).max() <= 1
    assert (np.asarray(image) == values).all()


def test_the_picture_of_an_animation_that_the_caller_chose() -> None:
    file = io.BytesIO()
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(file, "GIF", save_all=True, append_images=[second])
    image = Image.open(file)
    image.seek(1)
    assert (pixels(open_picture(image).image) == [0, 0, 255]).all()
    image.seek(0)
    assert (pixels(open_picture(image).image) == [255, 0, 0]).all()
