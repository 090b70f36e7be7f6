"""Clips: which pictures are taken of a video, a folder or a list, and what is refused."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from support.command import Ran

from lowmem_bagel import BagelPipeline, Clip, errors
from lowmem_bagel.errors import ImageError, MissingExtraError, SettingError, UserError
from lowmem_bagel.generation.inputs import open_terms
from lowmem_bagel.pictures import video
from lowmem_bagel.pictures.clips import pictures_of
from lowmem_bagel.pictures.frame_files import save_frames
from lowmem_bagel.pictures.video import evenly, write_video


def shades(count: int, size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    """Pictures that are told apart by their grey: 5 and 7 more from one to the next."""
    return [Image.new("RGB", size, (5 + 7 * number,) * 3) for number in range(count)]


def numbers(pictures: list[Any]) -> list[int]:
    return [round((np.asarray(picture.image).mean() - 5) / 7) for picture in pictures]


def movie(count: int = 20, container: str = "mp4", codec: str = "mpeg4", **about: Any) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=about.get("rate", 10))
        stream.width, stream.height, stream.pix_fmt = *about.get("size", (48, 32)), "yuv420p"
        stream.options = {"qscale": "2"}
        for image in shades(count, about.get("size", (48, 32))):
            output.mux(stream.encode(av.VideoFrame.from_image(image)))
        output.mux(stream.encode(None))
    return file.getvalue()


MOVIE = movie()


@pytest.mark.parametrize(("length", "count", "wanted"), [
    (9, 3, [0, 4, 8]), (20, 8, [0, 2, 5, 8, 10, 13, 16, 19]), (3, 8, [0, 1, 2]), (5, 1, [0]), (2, 2, [0, 1]),
])  # fmt: skip
def test_pictures_are_taken_evenly(length: int, count: int, wanted: list[int]) -> None:
    assert evenly(length, count) == wanted


@pytest.mark.parametrize(("container", "codec"), [
    ("mp4", "mpeg4"), ("mov", "mpeg4"), ("matroska", "mpeg4"), ("webm", "libvpx"), ("avi", "mpeg4"), ("mp4", "libx264"),
])  # fmt: skip
def test_every_container_that_is_named_is_read(container: str, codec: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this build has no {codec}")
    content = movie(20, container, codec)
    assert numbers(Clip(content).pictures()) == [0, 2, 5, 8, 10, 13, 16, 19]
    assert numbers(Clip(io.BytesIO(content), 2).pictures()) == [0, 19]


def test_a_folder_and_a_list_are_clips_too(tmp_path: Path) -> None:
    pictures = shades(5)
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number:02}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert numbers(Clip(tmp_path, 3).pictures()) == [0, 2, 4]
    assert numbers(Clip(str(tmp_path)).pictures()) == numbers(Clip(pictures).pictures()) == [0, 1, 2, 3, 4]
    assert numbers(pictures_of(tmp_path)) == [0, 1, 2, 3, 4]
    assert numbers(pictures_of(tmp_path / "03.png")) == [3]
    (tmp_path / "clip").write_bytes(MOVIE)
    assert numbers(pictures_of(tmp_path / "clip", 2)) == [0, 19]


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    written = save_frames(shades(6), tmp_path / "out.png", {"prompt": "a ball", "seed": 1}, fps=4)
    assert written[-1].name == "out.mp4"
    assert numbers(Clip(written[-1]).pictures()) == [0, 1, 2, 3, 4, 5]
    with av.open(str(written[-1])) as container:
        assert '"prompt": "a ball"' in container.metadata["comment"]
        assert float(container.streams.video[0].average_rate) == 4


def test_without_the_extra_there_is_no_video_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        MissingExtraError, match=r"is a video, which needs an extra: pip install 'lowmem-bagel\[video\]'"
    ):
        Clip(MOVIE).pictures()
    with pytest.raises(MissingExtraError, match="needs an extra"):
        write_video(shades(2), io.BytesIO(), {}, 8)
    assert [path.suffix for path in save_frames(shades(2), tmp_path / "out.png", {})] == [
        ".png",
        ".png",
        ".png",
        ".webp",
    ]


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(("content", "wrong"), [
    (b"", "not a video"), (PLAYLIST, "not a video"), (b"ffconcat version 1.0\nfile /etc/hostname\n", "not a video"),
    (MOVIE[:40], "damaged|without pictures"), (MOVIE[: len(MOVIE) // 2], "damaged|without|no picture"),
    (b"\x1aE\xdf\xa3" + bytes(500), "damaged|without|no pictures"),
    (b"RIFF\0\0\0\0AVI LIST" + bytes(99), "damaged|no pictures"),
])  # fmt: skip
def test_what_is_no_video_is_refused(content: bytes, wrong: str) -> None:
    with pytest.raises(ImageError, match=wrong):
        Clip(content).pictures()


def test_a_video_that_is_too_long_or_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_SECONDS", 1)
    with pytest.raises(ImageError, match="longer than 0 minutes"):
        Clip(MOVIE).pictures()
    monkeypatch.setattr(video, "MAX_SECONDS", 600)
    monkeypatch.setattr(video, "MAX_PACKETS", 19)
    with pytest.raises(ImageError, match="longer than"):
        Clip(MOVIE).pictures()
    monkeypatch.setattr(video, "MAX_PACKETS", 1000)
    monkeypatch.setattr(video, "YUV_BYTES", 850_000_000)
    with pytest.raises(ImageError, match="too large"):
        Clip(MOVIE).pictures()


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_damaged_videos_end_in_pictures_or_in_one_line(container: str) -> None:
    content, draw = movie(6, container), random.Random(7)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 4, 30))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        with contextlib.suppress(UserError):
            assert len(Clip(bytes(damaged)).pictures()) <= 8


@pytest.mark.parametrize(("matrix", "corner"), [((0, 1, -1, 0), "top right"), ((0, -1, 1, 0), "bottom left")])
def test_a_video_that_was_filmed_on_its_side_is_upright(matrix: tuple[int, ...], corner: str) -> None:
    """Phones say in the track's header how it is to be turned: by a quarter clockwise, or the other way."""
    image = Image.new("RGB", (64, 32))
    image.paste((255, 255, 255), (0, 0, 16, 16))  # at the top left, as it is stored
    file = io.BytesIO()
    write_video([image] * 2, file, {}, 8)
    plain, unity = bytearray(file.getvalue()), 1 << 16
    header = plain.index(b"tkhd")
    at = plain.index(struct.pack(">9i", unity, 0, 0, 0, unity, 0, 0, 0, 1 << 30), header)
    a, b, c, d = (value * unity for value in matrix)
    plain[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    shown = Clip(bytes(plain), 1).pictures()[0].image
    assert shown.size == (32, 64)
    assert shown.getpixel((25, 5) if corner == "top right" else (5, 58)) > (200, 200, 200)


@pytest.mark.parametrize(("clip", "kind"), [
    (Clip([]), ImageError), (Clip(MOVIE, 0), SettingError), (Clip(MOVIE, 1000), SettingError),
    (Clip("nowhere.mp4"), ImageError), (Clip(Path("/dev/zero")), ImageError), (Clip(3), ImageError),
])  # fmt: skip
def test_impossible_clips(clip: Clip, kind: type[errors.UserError]) -> None:
    with pytest.raises(kind):
        clip.pictures()


def test_a_clip_is_its_pictures_among_the_terms(small_pictures: BagelPipeline) -> None:
    assert [type(term).__name__ for term in open_terms([Clip(MOVIE, 3), "what next?"])] == ["Picture"] * 3 + ["str"]
    asked: dict[str, Any] = {"height": 32, "width": 32, "num_timesteps": 2, "seed": 0, "frames": 2}
    pictures = [picture.image for picture in Clip(MOVIE, 3).pictures()]
    wanted = small_pictures.run([*pictures, "what next?"], **asked)
    assert small_pictures.run([Clip(MOVIE, 3), "what next?"], **asked).images == wanted.images
    answer = small_pictures.ask("what?", Clip(MOVIE, 3), max_new_tokens=3)
    assert answer.token_ids == small_pictures.run([*pictures, "what?"], output="text", max_new_tokens=3).token_ids


def test_the_commands_take_clips_and_write_frames(cli: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(movie(6, size=(64, 64)))
    out = tmp_path / "next.png"
    ran = cli(
        "edit", tmp_path / "clip.mp4", "what next", "--clip-count", 2, "--frames", 2, "--num-timesteps", 2, "-o", out,
        "--width", 64, "--height", 64,
    )  # fmt: skip
    assert (ran.code, ran.out) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {
        "clip.mp4", "next-01.png", "next-02.png", "next-sheet.png", "next.webp", "next.mp4",
    }  # fmt: skip
    ran = cli("ask", "what?", "-i", tmp_path / "clip.mp4", "--clip-count", 2, "--max-new-tokens", 2)
    assert ran.code == 0
