"""Samples of TIFF files that Pillow has no mode for: signed, 32 and 64 bits, floats, deep ones in planes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from .depth import from_samples
from .directory import Directory
from .encoded import Note

if TYPE_CHECKING:
    from numpy import ndarray
    from PIL import Image

UNSIGNED, SIGNED, FLOAT = 1, 2, 3
NUMPY = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}
PLAIN, DEFLATE = (1,), (8, 32946)
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
            and self.compression in (*PLAIN, *DEFLATE)
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


def read_samples(file: BinaryIO, tags: Directory, layout: Layout, note: Note) -> Image.Image:
    """The picture in 8 bits; what its range was taken to be is noted."""
    import numpy as np

    width, height = layout.size
    form = np.dtype(f"{tags.order}{NUMPY[layout.kind]}{layout.bits // 8}")
    values = np.zeros((height, width, layout.samples), form.newbyteorder("="))
    for place, data in zip(_places(layout), _blocks(file, tags), strict=False):
        top, left, plane = place
        rows = min(layout.block[1], height - top)
        of_block = 1 if layout.planes else layout.samples
        block = _block(data, layout, form, of_block)[:rows, : width - left]
        target = values[top : top + rows, left : left + layout.block[0]]
        (target[..., plane : plane + 1] if layout.planes else target)[: len(block)] = block
    colors = COLORS[layout.photometric]
    alpha = values[..., colors] if layout.extra and layout.extra[0] in ALPHA else None
    premultiplied = alpha is not None and layout.extra[0] == ALPHA[0]
    return from_samples(values[..., :colors], alpha, premultiplied, layout.photometric, layout.words, note)


def _places(layout: Layout) -> Iterator[tuple[int, int, int]]:
    """Top, left and plane of each block, in the order they are stored."""
    for plane in range(layout.samples if layout.planes else 1):
        for top in range(0, layout.size[1], max(layout.block[1], 1)):
            for left in range(0, layout.size[0], max(layout.block[0], 1)):
                yield top, left, plane


def _blocks(file: BinaryIO, tags: Directory) -> Iterator[bytes]:
    tiled = 322 in tags.entries
    offsets, counts = tags.numbers(324 if tiled else 273), tags.numbers(325 if tiled else 279)
    for offset, count in zip(offsets, counts, strict=False):
        file.seek(offset)
        yield file.read(count)


def _block(data: bytes, layout: Layout, form: object, samples: int) -> ndarray:
    """A strip or tile [rows, width, samples], as many rows as it has."""
    import numpy as np

    if layout.subsampled != (1, 1):
        return _with_chroma(data, layout)
    kind = np.dtype(form)  # type: ignore[call-overload]
    width = layout.block[0]
    row = width * samples * kind.itemsize
    most = row * layout.block[1]
    whole = zlib.decompressobj().decompress(data, most) if layout.compression in DEFLATE else data[:most]
    rows = len(whole) // row
    if layout.predictor == 3:
        packed = np.frombuffer(whole, np.uint8, rows * row).reshape(rows, -1, samples)
        order = np.cumsum(packed, axis=1, dtype=np.uint8).reshape(rows, kind.itemsize, -1)
        whole, kind = order.transpose(0, 2, 1).tobytes(), kind.newbyteorder(">")
    values: ndarray = np.frombuffer(whole, kind, rows * width * samples).reshape(rows, width, samples)
    if layout.predictor == 2:
        values = np.cumsum(values, axis=1, dtype=kind.newbyteorder("="))
    return values


def _with_chroma(data: bytes, layout: Layout) -> ndarray:
    """A block of units, each the lumas of a few pixels and the chroma that they share, as [rows, width, 3]."""
    import numpy as np

    across, down = layout.subsampled
    width, height = layout.block
    wide, high = -(-width // across), -(-height // down)
    unit = across * down + 2
    most = wide * high * unit
    whole = zlib.decompressobj().decompress(data, most) if layout.compression in DEFLATE else data[:most]
    rows = len(whole) // (wide * unit)
    units = np.frombuffer(whole, np.uint8, rows * wide * unit).reshape(rows, wide, unit)
    luma = units[..., :-2].reshape(rows, wide, down, across).transpose(0, 2, 1, 3).reshape(rows * down, -1)
    chroma = units[..., -2:].repeat(down, axis=0).repeat(across, axis=1)
    return np.dstack([luma, chroma])[:height, :width]
