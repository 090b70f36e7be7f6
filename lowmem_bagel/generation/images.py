"""Pictures in and out: any file a person has -> RGB, the resize rule, tensors, and PNGs that remember their making."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checkpoint.config import ResizeRule
from ..errors import ImageError, OutputError

if TYPE_CHECKING:
    from PIL import Image

MIN_SIDE = 2
MAX_PIXELS = 178_956_970
"""Pillow's own limit against decompression bombs."""

METADATA_KEY = "lowmem-bagel"


def open_image(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """A picture as 8-bit RGB: rotated as its EXIF says, alpha composited on white, 16-bit scaled down.

    Raises:
        ImageError: the file is missing, not a picture, truncated, or of an impossible size.
    """
    from PIL import Image, UnidentifiedImageError

    name = "the picture" if isinstance(source, Image.Image) else os.fspath(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _opened(source) as image:
                return _decoded(image, name)
    except FileNotFoundError:
        raise ImageError(f"no such picture: {name}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror}); give a picture file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture in a format that Pillow reads; save it as PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: too large; scale it down to {MAX_PIXELS // 10**6} megapixels or fewer") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise for damaged files
        raise ImageError(f"{name}: damaged or truncated picture ({error}); save it again") from error


def _opened(source: str | os.PathLike[str] | Image.Image) -> AbstractContextManager[Image.Image]:
    from PIL import Image

    return nullcontext(source) if isinstance(source, Image.Image) else Image.open(Path(source).expanduser())


def _decoded(image: Image.Image, name: str) -> Image.Image:
    """A lazily opened picture, read whole. The size is checked first, so that no memory is taken in vain."""
    from PIL import ImageOps

    _check_size(image, name)
    image.load()
    return _to_rgb(ImageOps.exif_transpose(image))


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{name} is {width}x{height} pixels: too small; use one of at least {MIN_SIDE} pixels a side")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is {width}x{height} pixels: too large; scale it down to {MAX_PIXELS // 10**6} megapixels or fewer"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit and float greys: Pillow's own conversion would clip instead of scaling."""
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = 65535.0 if image.mode != "F" or values.max(initial=0.0) > 255.0 else 255.0
    if image.mode == "I" and values.max(initial=0.0) <= 255.0:
        peak = 255.0
    return Image.fromarray(np.clip(values * (255.0 / peak), 0, 255).round().astype(np.uint8)).convert("RGB")


def resize(image: Image.Image, rule: ResizeRule) -> Image.Image:
    """The picture at the rule's size, bicubic and antialiased, still 8-bit."""
    from PIL import Image

    return image.resize(rule.resized(*image.size), Image.Resampling.BICUBIC)


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture -> float32 [3, H, W] in [-1, 1]."""
    import numpy as np

    values = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
    return (values.float() / 255 - 0.5) / 0.5


def from_pixels(pixels: Tensor) -> Image.Image:
    """[3, H, W], nominally in [-1, 1] -> RGB picture, clamped and truncated to 8 bits as upstream does."""
    from PIL import Image

    values = (pixels.float() * 0.5 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
    return Image.fromarray(values.to("cpu", torch.uint8).numpy())


def save_png(image: Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> Path:
    """Write a PNG whose text chunks hold the metadata: the file appears whole or not at all.

    Raises:
        OutputError: the folder does not exist or cannot be written, or the disk is full.
    """
    from PIL.PngImagePlugin import PngInfo

    target = Path(path).expanduser()
    if os.path.exists(target) and not os.path.isfile(target):
        raise OutputError(f"{target} is not an ordinary file; choose another place with -o")
    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(dict(metadata), ensure_ascii=False))
    if metadata.get("prompt"):
        info.add_itxt("Description", str(metadata["prompt"]))
    partial = target.with_name(f".lowmem-bagel-{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            image.save(file, format="PNG", pnginfo=info)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise OutputError(f"cannot write {target} ({error.strerror or error}); choose another place with -o") from error
    finally:
        if os.path.lexists(partial):
            partial.unlink()
    return target


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata `save_png` wrote.

    Raises:
        ImageError: not a picture, or one that this program did not make.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                text = getattr(image, "text", {}).get(METADATA_KEY)
    except FileNotFoundError:
        raise ImageError(f"no such picture: {path}") from None
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path}: not a readable picture ({error})") from error
    if text is None:
        raise ImageError(f"{path}: carries no lowmem-bagel settings; only PNGs saved by this program do")
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{path}: its lowmem-bagel text chunk is damaged ({error})") from error
    if not isinstance(metadata, dict):
        raise ImageError(f"{path}: its lowmem-bagel text chunk is damaged")
    return metadata
