"""Pictures that remember their making: PNG, JPEG and WebP, written whole or not at all, and read back."""

from __future__ import annotations

import io
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import ImageError, OutputError
from ..files import expanded
from .directory import exif_directory
from .encoded import Source
from .jpeg import beside_jpeg
from .opening import opened
from .png import texts
from .quick_png import quick_png
from .sheets import SHEET_GAP, sheet
from .webp import beside_webp

if TYPE_CHECKING:
    from PIL import Image

KEY = "lowmem-bagel"
FPS = 8.0
"""Frames a second, where nothing else is said."""
EXIF_DIRECTORY, USER_COMMENT = 0x8769, 0x9286
ASCII_COMMENT = b"ASCII\0\0\0"
JPEG_BYTES = 65_000
"""Of EXIF, that a JPEG has room for."""
SETTINGS_BYTES = 4000
"""Of settings, without the prompt."""


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Refuse a name whose suffix is none of the formats that pictures are saved in. Without a suffix it is PNG.

    Raises:
        OutputError: with the three that are.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITERS:
        names = [path.with_suffix(suffix).name for suffix in (".png", ".jpg", ".webp")]
        raise OutputError(
            f"{path}: pictures are saved as PNG, JPEG or WebP; call it {', '.join(names[:2])} or {names[2]}"
        )


def check_room(path: str | os.PathLike[str], prompt: str) -> None:
    """Refuse a prompt that the format of a path has no room for, settings included.

    Raises:
        OutputError: with the formats that have room.
    """
    size = len(json.dumps(prompt)) + SETTINGS_BYTES
    if Path(path).suffix.lower() in (".jpg", ".jpeg") and size > JPEG_BYTES:
        raise OutputError(f"a JPEG has no room for {size} bytes of prompt and settings; save it as PNG or WebP")


def save_picture(
    image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, Any], more: Sequence[Image.Image] = ()
) -> Path:
    """Write a picture in the format of the path's suffix, with the metadata in the place that the format has.

    With `more` frames a WebP shows them one after the other, and other formats show all on one sheet. The file appears
    whole or not at all; of several writers of one path the last wins.

    Raises:
        OutputError: another suffix; the folder does not exist or cannot be written; the disk is full.
    """
    try:
        target = expanded(path)
    except (TypeError, RuntimeError) as error:  # no path, or a home that nobody has
        raise OutputError(f"cannot save to {type(path).__name__} {path!r:.100} ({error}); give a path") from error
    check_suffix(target)
    write_whole(target, lambda file: _write(image, more, target.suffix.lower(), file, metadata))
    return target


def write_whole(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        OutputError: its place is no file's, cannot be written, or the disk is full.
    """
    if os.path.exists(target) and not os.path.isfile(target):
        raise OutputError(f"{target} is not an ordinary file; choose another place with -o")
    partial = target.with_name(f".lowmem-bagel-{os.getpid()}-{secrets.token_hex(8)}.partial")
    try:
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {target} ({said}); choose another place with -o") from error
    finally:
        if os.path.lexists(partial):
            partial.unlink()


def picture_bytes(image: Image.Image, suffix: str, metadata: Mapping[str, Any]) -> bytes:
    """What `save_picture` would write of an RGB picture under a name with this suffix (".png", ".jpg", ".webp").

    For who waits for it: a PNG holds the same and is there sooner, so it may be somewhat larger.

    Raises:
        OutputError: the format has no room for the metadata.
    """
    return quick_png(image, _texts(metadata)) if suffix == ".png" else file_bytes(image, suffix, metadata)


def file_bytes(image: Image.Image, suffix: str, metadata: Mapping[str, Any], more: Sequence[Image.Image] = ()) -> bytes:
    """What `save_picture` writes of an RGB picture under a name with this suffix.

    Raises:
        OutputError: the format has no room for the metadata.
    """
    file = io.BytesIO()
    _write(image, more, suffix, file, metadata)
    return file.getvalue()


def _write(
    image: Image.Image, more: Sequence[Image.Image], suffix: str, file: BinaryIO, metadata: Mapping[str, Any]
) -> None:
    if more and suffix == ".webp":
        write_animation([image, *more], file, metadata)
    else:
        WRITERS[suffix](sheet([image, *more], SHEET_GAP), file, metadata)


def write_animation(
    images: Sequence[Image.Image], file: BinaryIO, metadata: Mapping[str, Any], fps: float = FPS
) -> None:
    """The pictures one after the other, again and again, as a lossless WebP."""
    first, *more = images
    first.save(
        file, format="WEBP", lossless=True, exif=_exif(metadata), save_all=True, append_images=more, loop=0,
        duration=round(1000 / fps),
    )  # fmt: skip


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that `save_picture` wrote.

    Raises:
        ImageError: not a picture, or one that this program did not make.
    """
    with opened(path) as source:
        text = _metadata_text(source)
    if text is None:
        raise ImageError(f"{path}: carries no lowmem-bagel settings; only pictures saved by this program do")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{path}: its lowmem-bagel settings are damaged ({error})") from error
    if not isinstance(metadata, dict):
        raise ImageError(f"{path}: its lowmem-bagel settings are damaged")
    return metadata


def _metadata_text(source: Source) -> bytes | None:
    head = source.file.read(12)
    if head.startswith(b"\x89PNG"):
        return dict(reversed([*texts(source)])).get(KEY.encode())
    if head.startswith(b"\xff\xd8"):
        return _comment(beside_jpeg(source).exif)
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return _comment(beside_webp(source).exif)
    raise ImageError(f"{source.name}: not a PNG, JPEG or WebP picture; only those carry settings")


def _comment(exif: bytes | None) -> bytes | None:
    """What the program said in EXIF's place for the user's comment."""
    directory = exif_directory(exif)
    inner = directory.inner(EXIF_DIRECTORY) if directory is not None else None
    comment = inner.content(USER_COMMENT) if inner is not None else None
    head = ASCII_COMMENT + KEY.encode() + b": "
    return comment.removeprefix(head) if comment is not None and comment.startswith(head) else None


def _exif(metadata: Mapping[str, Any]) -> bytes:
    from PIL import Image

    from .. import __version__

    exif = Image.Exif()
    exif[0x0131] = f"{KEY} {__version__}"
    exif.get_ifd(EXIF_DIRECTORY)[USER_COMMENT] = ASCII_COMMENT + f"{KEY}: {json.dumps(dict(metadata))}".encode()
    return exif.tobytes()


def _texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """What a PNG carries, by its names."""
    settings = {KEY: json.dumps(dict(metadata), ensure_ascii=False)}
    return settings | ({"Description": str(metadata["prompt"])} if metadata.get("prompt") else {})


def _as_png(image: Image.Image, file: BinaryIO, metadata: Mapping[str, Any]) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in _texts(metadata).items():
        info.add_itxt(name, text)
    image.save(file, format="PNG", pnginfo=info)


def _as_jpeg(image: Image.Image, file: BinaryIO, metadata: Mapping[str, Any]) -> None:
    check_room("picture.jpg", str(metadata.get("prompt", "")))
    image.save(file, format="JPEG", quality=95, subsampling=0, exif=_exif(metadata))


def _as_webp(image: Image.Image, file: BinaryIO, metadata: Mapping[str, Any]) -> None:
    image.save(file, format="WEBP", lossless=True, exif=_exif(metadata))


WRITERS: Mapping[str, Callable[[Image.Image, BinaryIO, Mapping[str, Any]], None]] = {
    "": _as_png,
    ".png": _as_png,
    ".jpg": _as_jpeg,
    ".jpeg": _as_jpeg,
    ".webp": _as_webp,
}
"""By a path's suffix."""
