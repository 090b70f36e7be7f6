"""Samples of TIFF files that Pillow has no mode for: signed, 32 and 64 bits, floats, deep ones in planes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .depth import from_samples
from .directory import Directory, entries_of, with_directory
from .encoded import Note, Source
from .pieces import pieced

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL import Image

UNSIGNED, SIGNED, FLOAT = 1, 2, 3
NUMPY = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}
LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)
"""Compressions that keep bytes as they are: none, LZW, deflate, runs, LZMA, zstd."""
YCBCR = 6
COLORS = {0: 1, 1: 1, 2: 3, 5: 4, YCBCR: 3}
"""Samples of a color by the photometric interpretation: white is zero, black is zero, RGB, inks, luma and chroma."""
ALPHA = (1, 2)
"""What an extra sample may be: alpha that was multiplied into the colors, or that was not."""


@dataclass(frozen=True)
class Layout:
    """How the samples lie in the file."""

    size: tuple[int, int]
    block: tuple[int, int]
    """Width and height of a strip or tile."""
    tiled: bool
    bits: int
    equal: bool
    """All samples have as many bits."""
    kind: int
    samples: int
    photometric: int
    extra: tuple[int, ...]
    planes: bool
    compression: int
    predictor: int
    foreign: bool
    """The header is one that Pillow misreads."""
    subsampled: tuple[int, int]
    """Columns and rows that share one chroma."""

    @property
    def bytes_a_pixel(self) -> float:
        return self.samples * self.bits / 8

    @property
    def cell_bytes(self) -> int:
        """Of a pixel, in one plane."""
        return (1 if self.planes else self.samples) * self.bits // 8

    @property
    def block_bytes(self) -> float:
        return self.block[0] * self.block[1] * self.bytes_a_pixel

    @property
    def words(self) -> str:
        kinds = {UNSIGNED: "whole numbers", SIGNED: "signed numbers", FLOAT: "floats"}
        return f"{self.bits} bits ({self.samples} a pixel, {kinds.get(self.kind, 'of another kind')})"

    @property
    def read_here(self) -> bool:
        """Whether Pillow would refuse, wrap or misread them, and they are stored in a way that is read here."""
        odd = self.planes or self.kind != UNSIGNED or self._alpha_of_grey or self.photometric == 0
        deep = self.bits > 16 or (self.bits == 16 and odd) or self.kind == SIGNED
        return (deep or self.foreign or self.photometric == YCBCR) and self._readable

    @property
    def _alpha_of_grey(self) -> bool:
        return self.samples > 1 and COLORS.get(self.photometric) == 1

    @property
    def _readable(self) -> bool:
        depths = {UNSIGNED: (8, 16, 32, 64), SIGNED: (8, 16, 32, 64), FLOAT: (16, 32, 64)}
        colors = COLORS.get(self.photometric, 99)
        chroma = self.bits == 8 and self.kind == UNSIGNED and self.samples == 3 and self.predictor == 1
        return (
            self.equal
            and (self.photometric != YCBCR or (chroma and {*self.subsampled} <= {1, 2, 4} and not self.planes))
            and self.bits in depths.get(self.kind, ())
            and colors <= self.samples <= 8
            and self.compression in LOSSLESS
            and self.predictor in ((1, 2, 3) if self.kind == FLOAT else (1, 2))
        )


def layout_of(tags: Directory) -> Layout | None:
    """What the tags say; None where they say no size."""
    width, height = tags.number(256, 0), tags.number(257, 0)
    if width < 1 or height < 1:
        return None
    bits, kinds = tags.numbers(258, (1,)), tags.numbers(339, (UNSIGNED,))
    tiled = 322 in tags.entries
    block = (tags.number(322, 0), tags.number(323, 0)) if tiled else (width, min(height, tags.number(278, height)))
    return Layout(
        (width, height),
        block,
        tiled,
        max(bits),
        min(bits) == max(bits) and min(kinds) == max(kinds),
        kinds[0],
        tags.number(277, 1),
        tags.number(262, 0),
        tags.numbers(338),
        tags.number(284, 1) == 2,
        tags.number(259, 1),
        tags.number(317, 1),
        tags.big and tags.order == ">",
        _subsampled(tags),
    )


def _subsampled(tags: Directory) -> tuple[int, int]:
    said = tags.numbers(530, (2, 2)) if tags.number(262, 0) == YCBCR else (1, 1)
    return (said[0], said[1]) if len(said) >= 2 else (2, 2)


def read_samples(source: Source, tags: Directory, layout: Layout, note: Note) -> Image.Image:
    """The picture in 8 bits; what its range was taken to be is noted."""
    import numpy as np

    planes = [_plane(source, tags, layout, plane) for plane in range(layout.samples if layout.planes else 1)]
    values = np.concatenate(planes, axis=2) if len(planes) > 1 else planes[0]
    colors = COLORS[layout.photometric]
    alpha = values[..., colors] if layout.extra and layout.extra[0] in ALPHA else None
    premultiplied = alpha is not None and layout.extra[0] == ALPHA[0]
    return from_samples(values[..., :colors], alpha, premultiplied, layout.photometric, layout.words, note)


def _plane(source: Source, tags: Directory, layout: Layout, plane: int) -> ndarray:
    """One plane, or all samples where they lie side by side: [H, W, samples]."""
    import numpy as np

    width, height = layout.size
    stored = _stored(source, tags, layout, plane)
    if layout.subsampled != (1, 1):
        return _with_chroma(stored, layout)[:height, :width]
    form = np.dtype(f"{tags.order}{NUMPY[layout.kind]}{layout.bits // 8}")
    samples = 1 if layout.planes else layout.samples
    if layout.predictor == 3:
        summed = np.cumsum(stored.reshape(*stored.shape[:2], -1, samples), axis=2, dtype=np.uint8)
        order = summed.reshape(*stored.shape[:2], form.itemsize, -1).transpose(0, 1, 3, 2)
        stored, form = np.ascontiguousarray(order), form.newbyteorder(">")
    values: ndarray = stored.reshape(height, -1).view(form).reshape(*stored.shape[:2], -1, samples)
    if layout.predictor == 2:
        values = np.cumsum(values, axis=2, dtype=form.newbyteorder("="))
    return values.reshape(height, -1, samples)[:, :width]


def _stored(source: Source, tags: Directory, layout: Layout, plane: int) -> ndarray:
    """The bytes of a plane as they are stored, decompressed: [rows, blocks in a row, bytes of a block's row].

    Pillow is given them as a picture of 8 bits, which it reads whatever they mean.
    """
    import numpy as np
    from PIL import TiffImagePlugin

    cell_width, cell_height = layout.subsampled
    cell = cell_width * cell_height + 2 if layout.subsampled != (1, 1) else layout.cell_bytes
    rows, block_rows = (-(-side // cell_height) for side in (layout.size[1], layout.block[1]))
    block_bytes = -(-layout.block[0] // cell_width) * cell
    across = -(-layout.size[0] // layout.block[0])
    count = across * -(-rows // block_rows)
    places = [tags.numbers(tag)[plane * count :][:count] for tag in ((324, 325) if layout.tiled else (273, 279))]
    # Four bytes a pixel where that goes: Pillow counts pixels, and warns of many.
    bands = 4 if block_bytes % (64 if layout.tiled else 4) == 0 else 1
    said: dict[int, tuple[int, ...]] = {
        256: (across * block_bytes // bands,),
        257: (rows,),
        258: (8,) * bands,
        259: (layout.compression,),
        262: (2 if bands == 4 else 1,),
        277: (bands,),
        338: (2,) * (bands // 4),
    }
    if layout.tiled:
        said |= {322: (block_bytes // bands,), 323: (block_rows,), 324: places[0], 325: places[1]}
    else:
        said |= {273: places[0], 278: (block_rows,), 279: places[1]}
    image = TiffImagePlugin.TiffImageFile(
        pieced(source.file, with_directory(source.length, entries_of({tag: v for tag, v in said.items() if v})))
    )
    image.load()
    return np.asarray(image).reshape(rows, across, block_bytes)


def _with_chroma(stored: ndarray, layout: Layout) -> ndarray:
    """Units, each the lumas of a few pixels and the chroma that they share, as [rows, width, 3]."""
    import numpy as np

    across, down = layout.subsampled
    units = stored.reshape(stored.shape[0], -1, across * down + 2)
    rows, wide, _ = units.shape
    luma = units[..., :-2].reshape(rows, wide, down, across).transpose(0, 2, 1, 3).reshape(rows * down, -1)
    return np.dstack([luma, units[..., -2:].repeat(down, axis=0).repeat(across, axis=1)])
