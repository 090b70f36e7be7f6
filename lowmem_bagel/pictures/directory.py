"""Directories of tags, as TIFF files and EXIF blocks have them: read with bounds, believed in nothing else."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from .pieces import Piece

MAX_ENTRIES = 4096
MAX_VALUE_BYTES = 64 << 20
FORMS: Mapping[int, str] = {1: "B", 2: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q", 18: "Q"}
"""struct's letter of each type of whole numbers and bytes."""
OTHERS: Mapping[int, str] = {5: "II", 10: "ii", 11: "f", 12: "d", 17: "q"}
"""Of the types that are never needed here."""


@dataclass(frozen=True)
class Entry:
    """One tag as it is stored: `place` is where its value begins in the file."""

    kind: int
    count: int
    place: int
    stored: bytes
    """All of the entry, to be written elsewhere as it is."""


class Directory:
    """The tags of one directory."""

    def __init__(self, file: BinaryIO, length: int, order: str, big: bool) -> None:
        self.order, self.big = order, big
        self.entries: dict[int, Entry] = {}
        self._file, self._length = file, length

    def numbers(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The values of a tag; the default where it is missing, of another type, or cut off."""
        entry = self.entries.get(tag)
        form = FORMS.get(entry.kind) if entry is not None else None
        if entry is None or form is None or not entry.count:
            return default
        size = struct.calcsize(form) * entry.count
        data = self._read(entry.place, size) if size <= MAX_VALUE_BYTES else b""
        return struct.unpack(f"{self.order}{entry.count}{form}", data) if len(data) == size else default

    def number(self, tag: int, default: int) -> int:
        """The first value of a tag."""
        return self.numbers(tag, (default,))[0]

    def content(self, tag: int) -> bytes | None:
        """A value as it is stored; None where it is missing or cut off."""
        values = self.numbers(tag)
        return bytes(value & 255 for value in values) if values else None

    def is_whole(self, tag: int) -> bool:
        """Whether a value is of a known type, and all of it in the file."""
        entry = self.entries[tag]
        form = FORMS.get(entry.kind) or OTHERS.get(entry.kind)
        size = 0 if form is None else struct.calcsize(f"={form}") * entry.count
        return 0 < size <= MAX_VALUE_BYTES and entry.place + size <= self._length

    def inner(self, tag: int) -> Directory | None:
        """The directory that a tag points to."""
        place = self.number(tag, 0)
        return Directory(self._file, self._length, self.order, self.big).filled(place) if place else None

    def filled(self, place: int) -> Directory:
        """This directory with the entries at a place in the file, as many as there are."""
        size, head, counter, inline = (20, 12, "Q", 8) if self.big else (12, 8, "H", 4)
        letter, width = ("Q", 8) if self.big else ("I", 4)
        begin = self._read(place, struct.calcsize(counter))
        count = struct.unpack(self.order + counter, begin)[0] if len(begin) == struct.calcsize(counter) else 0
        place += len(begin)
        table = self._read(place, size * min(count, MAX_ENTRIES))
        for start in range(0, len(table) - size + 1, size):
            stored = table[start : start + size]
            tag, kind, number = struct.unpack_from(f"{self.order}HH{letter}", stored)
            bytes_in_all = struct.calcsize("=" + (FORMS.get(kind) or OTHERS.get(kind, "Q"))) * number
            points_to = struct.unpack(f"{self.order}{letter}", stored[-width:])[0]
            own = place + start + head
            self.entries.setdefault(tag, Entry(kind, number, own if bytes_in_all <= inline else points_to, stored))
        return self

    def _read(self, place: int, size: int) -> bytes:
        if place >= self._length:
            return b""
        self._file.seek(place)
        return self._file.read(size)


def read_directory(file: BinaryIO) -> Directory | None:
    """The first directory of a TIFF file or an EXIF block; None where there is none."""
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    version = struct.unpack_from(f"{order}H", head, 2)[0] if order and len(head) >= 8 else 0
    if order is None or version not in (42, 43) or (version == 43 and len(head) < 16):
        return None
    form, place = ("Q", 8) if version == 43 else ("I", 4)
    first = struct.unpack_from(order + form, head, place)[0]
    return Directory(file, length, order, version == 43).filled(first)


def exif_directory(block: bytes | None) -> Directory | None:
    """The directory of an EXIF block, with or without its customary prefix."""
    return read_directory(io.BytesIO((block or b"").removeprefix(b"Exif\0\0")))


def entries_of(values: Mapping[int, tuple[int, ...]]) -> list[tuple[bytes, bytes]]:
    """Entries of whole numbers of 32 bits for `with_directory`: heads and values."""
    return [
        (struct.pack("<HHI", tag, 4, len(numbers)), struct.pack(f"<{len(numbers)}I", *numbers))
        for tag, numbers in sorted(values.items())
    ]


def with_directory(
    length: int, entries: Sequence[tuple[bytes, bytes]], order: str = "<", big: bool = False
) -> list[Piece]:
    """A TIFF file with another directory at its end.

    Args:
        length: of the file.
        entries: heads and values; a value that is longer than there is room for is put behind the directory.
    """
    form, counter, letter, room = ("HHHQ", "Q", "Q", 8) if big else ("HI", "H", "I", 4)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + form, *((43, 8, 0) if big else (42,)), length)
    place = length + struct.calcsize("=" + counter) + sum(len(start) + room for start, _ in entries) + room
    table, values = struct.pack(order + counter, len(entries)), b""
    for start, value in entries:
        if len(value) <= room:
            table += start + value.ljust(room, b"\0")
        else:
            table += start + struct.pack(order + letter, place + len(values))
            values += value
    return [head, (len(head), length), table + bytes(room) + values]
