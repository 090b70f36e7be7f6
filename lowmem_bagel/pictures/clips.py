"""Clips: pictures that follow one another, taken evenly from a video, a folder or a list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ImageError, SettingError
from ..files import expanded, readable
from .callers import is_url
from .opening import Picture, open_picture, opened
from .video import container_of, evenly, read_video

if TYPE_CHECKING:
    from .callers import PictureSource

COUNT = 8
"""Pictures of a clip, where nothing else is said: the fewest that the model was trained to understand a video by."""
MAX_COUNT = 256
MAX_LISTED = 100_000
"""Pictures, or names in a folder, that are chosen from."""
SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".ppm"))
"""Of the pictures of a folder."""


@dataclass(frozen=True)
class Clip:
    """A term of a request that stands for several pictures.

    source: a video (a path, bytes or a file object; MP4, MOV, WebM, Matroska or AVI), a folder of pictures in order of
    their names, or a list of pictures in any form that a picture is given in. count: how many are taken, evenly
    spaced, the first and the last among them; all where there are fewer.
    """

    source: PictureSource | Sequence[PictureSource]
    count: int = COUNT

    def pictures(self) -> list[Picture]:
        """The pictures that are taken, opened.

        Raises:
            ImageError: it holds no picture, or one that cannot be used; a video is damaged, too long or too large.
            MissingExtraError: an optional package reads it.
            SettingError: an impossible count.
        """
        if not isinstance(self.count, int) or not 1 <= self.count <= MAX_COUNT:
            raise SettingError(
                f"the count of a clip must be a whole number from 1 to {MAX_COUNT}, not {self.count!r:.50}"
            )
        if isinstance(self.source, (list, tuple)):
            return self._of_list(self.source, "the clip")
        if isinstance(self.source, (str, os.PathLike)) and not is_url(self.source):
            folder = expanded(os.fsdecode(self.source))
            with readable(ImageError):
                if os.path.isdir(folder):
                    return self._of_list(_in_folder(folder), str(folder))
        with opened(self.source) as content:
            return [Picture(image) for image in read_video(content, self.count)]

    def _of_list(self, pictures: Sequence[PictureSource], name: str) -> list[Picture]:
        if not pictures:
            raise ImageError(f"{name}: there is no picture in it")
        if len(pictures) > MAX_LISTED:
            raise ImageError(f"{name}: more than {MAX_LISTED} pictures; give fewer")
        return [open_picture(pictures[place]) for place in evenly(len(pictures), self.count)]


def _in_folder(folder: Path) -> list[Path]:
    """Its pictures by name."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry, _ in zip(entries, range(MAX_LISTED + 1), strict=False)]
    return [folder / name for name in sorted(names) if os.path.splitext(name)[1].lower() in SUFFIXES]


def pictures_of(path: Path, count: int = COUNT) -> list[Picture]:
    """What a path leads to: the pictures of a folder or a video, as a `Clip` takes them, or one picture.

    Raises:
        ImageError, MissingExtraError, SettingError: as of `Clip.pictures`.
    """
    if os.path.isdir(expanded(path)):
        return Clip(path, count).pictures()
    with opened(path) as content:
        moving = container_of(content) is not None
    return Clip(path, count).pictures() if moving else [open_picture(path)]
