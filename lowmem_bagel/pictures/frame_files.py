"""Frames as files: numbered pictures, all on one sheet, and one after the other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import expanded
from .saving import FPS, check_suffix, save_picture, write_animation, write_whole
from .sheets import SHEET_GAP, sheet
from .video import can_write_video, write_video

if TYPE_CHECKING:
    from PIL import Image


def numbered(path: Path, number: int, count: int) -> Path:
    """The name of one of `count` frames, the first of which is number 1: out-01.png beside out.png."""
    return path.with_name(f"{path.stem}-{number:0{max(2, len(str(count)))}}{path.suffix or '.png'}")


def save_frames(
    images: Sequence[Image.Image], path: str | os.PathLike[str], metadata: Mapping[str, Any], fps: float = FPS
) -> list[Path]:
    """Write each frame, a sheet of all, an animated WebP and, where PyAV is there, an MP4, each with the metadata that
    its format has a place for.

    For out.png: out-01.png and so on, out-sheet.png, out.webp, out.mp4.

    Raises:
        OutputError: as of `save_picture`.
    """
    path = expanded(path)
    check_suffix(path)
    written = []
    for number, image in enumerate(images, 1):
        said = {**metadata, "frame": number}
        written.append(save_picture(image, numbered(path, number, len(images)), said))
    whole = path.with_name(f"{path.stem}-sheet{path.suffix or '.png'}")
    written.append(save_picture(sheet(images, SHEET_GAP), whole, metadata))
    moving = path.with_name(f"{path.stem}.webp")
    write_whole(moving, lambda file: write_animation(images, file, metadata, fps))
    written.append(moving)
    if can_write_video():
        video = path.with_name(f"{path.stem}.mp4")
        write_whole(video, lambda file: write_video(images, file, metadata, fps))
        written.append(video)
    return written
