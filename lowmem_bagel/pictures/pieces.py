"""A file put together from stretches of another one, so that a decoder never sees what lies beside the pixels."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import BinaryIO, TypeAlias

Piece: TypeAlias = bytes | tuple[int, int]
"""Bytes of our own, or a stretch of the file: its start and end."""


def pieced(file: BinaryIO, pieces: Sequence[Piece]) -> BinaryIO:
    """The pieces one after the other, as a file that can only be read. Nothing is copied."""
    return io.BufferedReader(_Pieces(file, pieces))


class _Pieces(io.RawIOBase):
    def __init__(self, file: BinaryIO, pieces: Sequence[Piece]) -> None:
        self._file = file
        self._pieces = _joined(pieces)
        self._starts = [0, *accumulate(map(_length, self._pieces))]
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._starts[-1]}[whence]
        if base + offset < 0:
            raise ValueError(f"negative place in a file: {base + offset}")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._place >= self._starts[-1]:
            return 0
        index = bisect_right(self._starts, self._place) - 1
        skipped = self._place - self._starts[index]
        data = self._part(self._pieces[index], skipped, len(buffer))
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _part(self, piece: Piece, skipped: int, most: int) -> bytes:
        if isinstance(piece, bytes):
            return piece[skipped : skipped + most]
        self._file.seek(piece[0] + skipped)
        return self._file.read(min(most, _length(piece) - skipped))


def _length(piece: Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Stretches that follow each other in the file become one; empty pieces are left out."""
    joined: list[Piece] = []
    for piece in pieces:
        last = joined[-1] if joined else b""
        if not isinstance(piece, bytes) and not isinstance(last, bytes) and last[1] == piece[0]:
            joined[-1] = (last[0], piece[1])
        elif _length(piece):
            joined.append(piece)
    return joined
