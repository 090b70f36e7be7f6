"""TIFF files put together by hand, in the ways that Pillow does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np

KINDS = {"u": 1, "i": 2, "f": 3}


def tiff(
    values: np.ndarray,
    photometric: int = 1,
    *,
    order: str = "<",
    bits: int | None = None,
    planes: bool = False,
    deflated: bool = False,
    predictor: int = 1,
    tile: tuple[int, int] | None = None,
    rows: int | None = None,
    extra: tuple[int, ...] = (),
    big: bool = False,
    contents: list[bytes] | None = None,
    others: Mapping[int, tuple[int, ...]] | None = None,
) -> bytes:
    """A file of values [H, W] or [H, W, samples] of any type of numpy.

    Args:
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 5 inks.
        bits: where samples are packed tighter than in their type: 12.
        tile: height and width of tiles; otherwise strips of `rows` rows.
        extra: what the samples after the colors are.
        contents: of the strips, in place of the values.
        others: further tags of whole numbers.
    """
    values = values[..., None] if values.ndim == 2 else values
    height, width, samples = values.shape
    step_y, step_x = tile or (rows or height, width)
    blocks = []
    for plane in np.split(values, samples, axis=2) if planes else [values]:
        for top in range(0, height, step_y):
            for left in range(0, width, step_x):
                block = plane[top : top + step_y, left : left + step_x]
                if tile:
                    edges = ((0, step_y - block.shape[0]), (0, step_x - block.shape[1]), (0, 0))
                    block = np.pad(block, edges)
                data = contents[len(blocks)] if contents else _packed(block, order, bits, predictor)
                blocks.append(zlib.compress(data) if deflated else data)
    depth = bits or values.dtype.itemsize * 8
    tags: dict[int, tuple[int, ...]] = {
        256: (width,), 257: (height,), 258: (depth,) * samples, 259: (8 if deflated else 1,), 262: (photometric,),
        277: (samples,), 284: (2 if planes else 1,), 317: (predictor,), 339: (KINDS[values.dtype.kind],) * samples,
    }  # fmt: skip
    if extra:
        tags[338] = extra
    tags |= {322: (step_x,), 323: (step_y,)} if tile else {278: (step_y,)}
    tags |= dict(others or {})
    return _assembled(tags, blocks, (324, 325) if tile else (273, 279), order, big)


def _packed(block: np.ndarray, order: str, bits: int | None, predictor: int) -> bytes:
    if bits == 12:
        pairs = block.reshape(block.shape[0], -1, 2).astype(np.uint32)
        joined = (pairs[..., 0] << 12) | pairs[..., 1]
        return np.stack([joined >> 16, joined >> 8 & 255, joined & 255], -1).astype(np.uint8).tobytes()
    if predictor == 3:
        high_first = np.ascontiguousarray(block.astype(block.dtype.newbyteorder(">"))).view(np.uint8)
        rows = high_first.reshape(block.shape[0], -1, block.dtype.itemsize).transpose(0, 2, 1)
        spread = rows.reshape(block.shape[0], -1, block.shape[2]).copy()
        spread[:, 1:] -= rows.reshape(block.shape[0], -1, block.shape[2])[:, :-1]
        return spread.tobytes()
    if predictor == 2:
        steps = block.copy()
        steps[:, 1:] -= block[:, :-1]
        block = steps
    return block.astype(block.dtype.newbyteorder(order)).tobytes()


def _assembled(
    tags: dict[int, tuple[int, ...]], blocks: list[bytes], names: tuple[int, int], order: str, big: bool
) -> bytes:
    start = 16 if big else 8
    offsets, place = [], start
    for block in blocks:
        offsets.append(place)
        place += len(block)
    body = b"".join(blocks)
    tags = {**tags, names[0]: tuple(offsets), names[1]: tuple(len(block) for block in blocks)}
    word, inline = ("Q", 8) if big else ("I", 4)
    head = (b"II" if order == "<" else b"MM") + struct.pack(
        *((order + "HHHQ", 43, 8, 0, place) if big else (order + "HI", 42, place))
    )
    after = place + struct.calcsize("=Q" if big else "=H") + len(tags) * (20 if big else 12) + inline
    table, tail = struct.pack(order + ("Q" if big else "H"), len(tags)), b""
    for tag, numbers in sorted(tags.items()):
        data = struct.pack(f"{order}{len(numbers)}I", *numbers)
        stored = data.ljust(inline, b"\0") if len(data) <= inline else struct.pack(order + word, after + len(tail))
        tail += b"" if len(data) <= inline else data
        table += struct.pack(order + "HH" + word, tag, 4, len(numbers)) + stored
    return head + body + table + bytes(inline) + tail
