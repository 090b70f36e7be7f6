"""What callers hand over as a picture: arrays and tensors, and content as bytes, data: URLs and file objects."""

from __future__ import annotations

import base64
import binascii
import os
import re
import urllib.parse
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ImageError
from .encoded import MAX_FILE_BYTES, check_size

if TYPE_CHECKING:
    from typing import BinaryIO

    from numpy import ndarray
    from PIL import Image

    PictureSource: TypeAlias = (
        str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | ndarray | Any
    )
Data: TypeAlias = bytes | bytearray | memoryview

WANTED = "give uint8, or floats from 0 to 1, of shape (height, width, 3)"
CHANNELS = (1, 3, 4)


def is_url(source: object) -> bool:
    """Whether a text is content written as a URL."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def is_data_url(source: object) -> bool:
    """Whether a text is a picture written as a URL."""
    return isinstance(source, str) and source[:11].lower() == "data:image/"


def image_of(source: PictureSource, name: str) -> Image.Image | None:
    """A PIL image, or one made from an array or a tensor; None for what must be read first.

    Raises:
        ImageError: an array is of another shape, type or range.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (str, bytes, bytearray, memoryview, os.PathLike)) or hasattr(source, "read"):
        return None
    if hasattr(source, "detach") and hasattr(source, "cpu"):
        return _from_array(_of_tensor(source, name), name)
    if hasattr(source, "__array__") or hasattr(source, "__array_interface__"):
        import numpy as np

        return _from_array(np.asarray(source), name)
    raise ImageError(
        f"{name} is of type {type(source).__name__}; "
        "give a path, a PIL image, an array, a tensor, bytes or a file object"
    )


def unread_file(image: Image.Image) -> Any:
    """The file of a picture that the caller opened with Pillow and did not load: it is read as any other file.

    None for pictures in memory, later pictures of an animation, and files that cannot go back to their start.
    """
    file = getattr(image, "fp", None)
    try:
        fresh = bool(getattr(image, "tile", None)) and image.tell() == 0 and file is not None and file.seekable()
    except (OSError, ValueError, AttributeError, EOFError):  # closed, or not quite a file
        return None
    return file if fresh else None


def content_of(source: PictureSource, name: str) -> Data:
    """What bytes, a data: URL or a file object hold.

    Raises:
        ImageError: it is no content, or too much.
    """
    if isinstance(source, str):
        data: Any = _of_url(source, name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = source
    else:
        data = _read(source, name)
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ImageError(f"{name}: the file object gives {type(data).__name__}; open it in binary mode")
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"{name}: too large; give one of {MAX_FILE_BYTES >> 20} MB or fewer")
    return data


def _read(source: Any, name: str) -> Any:
    """All of a file object, from its start where it can go there; left where it was."""
    try:
        place = source.tell() if hasattr(source, "seek") and hasattr(source, "tell") else None
        if place is not None:
            source.seek(0)
    except (OSError, ValueError):  # a pipe
        place = None
    try:
        data = source.read(MAX_FILE_BYTES + 1)
        if place is not None:
            source.seek(place)
    except (OSError, ValueError, TypeError) as error:
        raise ImageError(f"{name}: cannot be read ({error}); give an open file") from error
    return data


def _of_url(url: str, name: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise ImageError(f"{name}: the data: URL has no comma before its content; give data:image/png;base64,...")
    if len(body) > MAX_FILE_BYTES * 4 // 3:
        raise ImageError(f"{name}: too large; give one of {MAX_FILE_BYTES >> 20} MB or fewer")
    plain = urllib.parse.unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return plain
    digits = re.sub(rb"\s+", b"", plain).translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except binascii.Error as error:
        raise ImageError(f"{name}: the data: URL is not base64 ({error})") from error


def _of_tensor(tensor: Any, name: str) -> ndarray:
    """A tensor as an array of the layout HxW or HxWxC; CxHxW, as torch has pictures, is turned round."""
    values = tensor.detach().cpu()
    if getattr(values, "is_floating_point", lambda: False)():
        values = values.float()  # numpy has no bfloat16
    shape = tuple(values.shape)
    array: ndarray = values.numpy()
    return array.transpose(1, 2, 0) if len(shape) == 3 and shape[0] in CHANNELS else array


def _from_array(array: ndarray, name: str) -> Image.Image:
    import numpy as np
    from PIL import Image

    described = f"{name} is an array of {array.dtype} and shape {array.shape}"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in CHANNELS):
        remedy = (
            "; transpose(1, 2, 0) brings the channels last" if array.ndim == 3 and array.shape[0] in CHANNELS else ""
        )
        one = "; give one picture of the batch" if array.ndim == 4 else ""
        raise ImageError(f"{described}: {WANTED}{remedy}{one}")
    check_size(name, (array.shape[1], array.shape[0]), 4 + 2 * array.itemsize)
    if array.dtype.kind == "f":
        array = _eight_bits(array, described)
    if array.dtype != np.uint8:
        raise ImageError(f"{described}: {WANTED}; divide what is brighter than 255")
    return Image.fromarray(np.ascontiguousarray(array))


def _eight_bits(array: ndarray, described: str) -> ndarray:
    import numpy as np

    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # not so either where one is no number
        raise ImageError(
            f"{described} with values from {low:g} to {high:g}: {WANTED}; divide by 255 what goes up to it"
        )
    return (array * 255).round().astype(np.uint8)
