"""TIFF: the tags that make the pixels go to the decoder; deep samples that Pillow cannot hold are read by `samples`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ImageError
from .directory import Directory, read_directory, with_directory
from .encoded import ORIENTATION, Beside, Encoded, Note, Source, bytes_of
from .pieces import pieced
from .samples import Layout, layout_of, read_samples

if TYPE_CHECKING:
    from PIL import Image

COLOR_MAP, XMP, ICC = 320, 700, 34675
PIXELS = frozenset(
    (254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338,
     339, 347, *range(512, 522), 529, 530, 531, 532)
)  # fmt: skip
"""Tags that say how pixels are stored."""
MAX_BLOCK_BYTES = 256 << 20
"""Of one strip or tile, decoded."""


def read_tiff(source: Source) -> Encoded:
    tags = read_directory(source.file)
    layout = layout_of(tags) if tags is not None else None
    if tags is None or layout is None:
        raise ImageError(f"{source.name}: damaged or truncated picture (no size is said in it); save it again")
    beside = Beside(tags.content(ICC), None, tags.content(XMP), tags.number(ORIENTATION, 0))
    if layout.block_bytes > MAX_BLOCK_BYTES:
        raise ImageError(f"{source.name}: {layout.block_bytes} bytes in one strip or tile are too many; save it again")
    if layout.read_here:
        held = 3 * layout.bytes_a_pixel + bytes_of("RGBA")
        return Encoded(layout.size, held, lambda note: read_samples(source, tags, layout, note), beside)
    return _by_pillow(source, tags, layout, beside)


def _by_pillow(source: Source, tags: Directory, layout: Layout, beside: Beside) -> Encoded:
    from PIL import TiffImagePlugin

    try:
        pieces = with_directory(source.length, _of_pixels(tags), tags.order, tags.big)
        image = TiffImagePlugin.TiffImageFile(pieced(source.file, pieces))
    except SyntaxError as error:
        raise ImageError(
            f"{source.name}: samples of {layout.words} are not read; save it with 8 or 16 bits a sample"
        ) from error
    white = float((1 << layout.bits) - 1) if layout.bits in (12, 16) and layout.kind == 1 else None
    inverted = layout.photometric == 0 and image.mode not in ("1", "L")

    if image.palette is not None and max(tags.numbers(COLOR_MAP, (256,))) < 256:
        image.putpalette(_small_palette(tags))

    def decode(note: Note) -> Image.Image:
        image.load()
        return _inverted(image) if inverted else image

    held = bytes_of(image.mode) + layout.bytes_a_pixel + (2 if inverted else 0)
    return Encoded(image.size, held, decode, beside, white)


def _of_pixels(tags: Directory) -> list[tuple[bytes, bytes]]:
    """The entries that say how pixels are stored, as they are, their places included."""
    width = 8 if tags.big else 4
    kept = (entry.stored for tag, entry in sorted(tags.entries.items()) if tag in PIXELS and tags.is_whole(tag))
    return [(stored[:-width], stored[-width:]) for stored in kept]


def _small_palette(tags: Directory) -> bytes:
    """Colors of 8 bits where 16 are due, which viewers mind: all reds, all greens, all blues."""
    values = tags.numbers(COLOR_MAP)
    count = len(values) // 3
    return bytes(value for index in range(count) for value in values[index::count][:3])


def _inverted(image: Image.Image) -> Image.Image:
    """White is zero, which Pillow minds for 8 bits and fewer alone."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    return Image.fromarray((np.iinfo(np.uint16).max if values.dtype.kind == "u" else values.max()) - values)
