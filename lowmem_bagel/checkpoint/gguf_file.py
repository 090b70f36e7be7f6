"""One GGUF file of BAGEL's: a header that is validated before anything is believed, and tensors without copies.

The format is "GGUF", a version and two counts; keys with values of any type; each tensor's name, sizes (the fastest
first), type and place; then the data, every tensor at a multiple of the alignment. A header may be written by anybody,
so nothing is believed before it was compared with the file's size, and values that are not needed are stepped over.

A file of ours is complete in itself: what a folder has in small files stands under `bagel.file.NAME`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import CheckpointError, printable
from .first_bytes import FIRST_BYTES, text_instead, what_instead
from .gguf_blocks import BLOCK_TYPES, FLOAT_TYPES, OTHER_TYPES
from .safetensors_file import DTYPE_BYTES, Header, SafetensorsFile, TensorEntry, TensorFile, check_overlaps

if TYPE_CHECKING:
    import torch

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)
ARCHITECTURE = "bagel"
HELD = "bagel.file."
"""What the key of a small file begins with; its name follows."""
OURS = "give one that `lowmem-bagel convert FOLDER OUT --to gguf` makes"
MAX_HEADER = 128 << 20
"""Bytes: a vocabulary of a million tokens several times over."""
MAX_ITEMS = 1 << 20
"""Texts in a list."""
MAX_COUNT = 1 << 16
"""Keys, and tensors."""
MAX_NAME = 300
MAX_DIMENSIONS = 4
TEXT, LIST = 8, 9
SCALARS: Mapping[int, str] = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
"""How a value of a type is packed."""
KINDS: Mapping[int, str] = {**FLOAT_TYPES, **{kind.number: kind.name for kind in BLOCK_TYPES.values()}}
"""Types of tensors that are read."""

Value = str | int | float | bool | None


class GgufFile(TensorFile):
    """A memory-mapped GGUF file. Tensors that are stored in blocks have a block type's name as their dtype, the
    tensor's own shape, and are read as bytes. `metadata` has the values that are texts.

    Raises:
        CheckpointError: missing, truncated, something else, of another architecture, or with a header that does not
            describe the file.
    """

    def _read_header(self, file: BinaryIO) -> Header:
        return _Reader(self.path, file, self.size).header()

    def tensor(self, name: str) -> torch.Tensor:
        """As of other files; of blocks their bytes, uint8 [nbytes]."""
        import torch

        entry = self.entries[name]
        if entry.dtype not in BLOCK_TYPES:
            return super().tensor(name)
        if not entry.nbytes:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._writable(), dtype=torch.uint8, count=entry.nbytes, offset=entry.start)


def open_tensors(path: Path) -> TensorFile:
    """A file of weights, by what its name says that it is.

    Raises:
        CheckpointError: as of `SafetensorsFile` and `GgufFile`.
    """
    return GgufFile(path) if path.name.lower().endswith(SUFFIX) else SafetensorsFile(path)


class _Reader:
    """Steps through a header; every length is compared with what is left before anything is read."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.at = 0

    def header(self) -> Header:
        tensors, keys = self._start()
        values = self._values(keys)
        self._check_architecture(values)
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.damaged(f"its alignment is {alignment!r}, not a power of two")
        found = self._tensors(tensors)
        data = -(-self.at // alignment) * alignment
        entries = {name: self._entry(name, *fields, alignment, data) for name, fields in found.items()}
        check_overlaps(self.path, entries.values(), data)
        return Header(entries, {key: value for key, value in values.items() if isinstance(value, str)}, data)

    def damaged(self, what: str, remedy: str = "get the file anew") -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; {remedy}")

    def take(self, count: int) -> bytes:
        self._check(count)
        data = self.file.read(count)
        if len(data) < count:  # it shrank meanwhile
            raise self._truncated()
        self.at += count
        return data

    def number(self, packed: str) -> int:
        value: int = struct.unpack(packed, self.take(struct.calcsize(packed)))[0]
        return value

    def text(self) -> str:
        try:
            return self.take(self.number("<Q")).decode()
        except UnicodeDecodeError:
            raise self.damaged("a text in its header is not UTF-8") from None

    def _check(self, count: int) -> None:
        if count > self.size - self.at:
            raise self._truncated()
        if count > MAX_HEADER - self.at:
            raise self.damaged(f"its header is larger than {MAX_HEADER >> 20} MiB")

    def _truncated(self) -> CheckpointError:
        return self.damaged("the file ends inside its header (truncated)", "download it again")

    def _skip(self, count: int) -> None:
        self._check(count)
        self.file.seek(count, 1)
        self.at += count

    def _start(self) -> tuple[int, int]:
        head = self.file.read(FIRST_BYTES)
        self.file.seek(0)
        if not head.startswith(MAGIC):
            other = what_instead(head) or text_instead(head)
            raise CheckpointError(f"{self.path}: not a GGUF file{f' but {other}' if other else f'; {OURS}'}")
        self.at = self.file.seek(len(MAGIC))
        version = self.number("<I")
        if version not in VERSIONS:
            raise self.damaged(f"is of GGUF version {version}, and {' and '.join(map(str, VERSIONS))} are read", OURS)
        return self._count("tensors"), self._count("keys")

    def _count(self, what: str) -> int:
        count = self.number("<Q")
        if count > MAX_COUNT:
            raise self.damaged(f"its header counts {count} {what}, more than {MAX_COUNT}")
        return count

    def _values(self, count: int) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for _ in range(count):
            key = self.text()
            if key in values:
                raise self.damaged(f"the key {key[:MAX_NAME]} appears twice in its header")
            values[key] = self._value(self.number("<I"))
        return values

    def _value(self, kind: int) -> Value:
        """A value; of a list nothing, since none is needed."""
        if kind == TEXT:
            return self.text()
        if kind == LIST:
            self._skip_list()
            return None
        if kind not in SCALARS:
            raise self.damaged(f"a value in its header is of the unknown type {kind}")
        return self.number(SCALARS[kind])

    def _skip_list(self) -> None:
        kind, count = self.number("<I"), self.number("<Q")
        if kind in SCALARS:
            self._skip(count * struct.calcsize(SCALARS[kind]))
            return
        if kind != TEXT or count > MAX_ITEMS:
            what = "is of lists or of an unknown type" if kind != TEXT else f"has {count} texts"
            raise self.damaged(f"a list in its header {what}")
        for _ in range(count):
            self._skip(self.number("<Q"))

    def _check_architecture(self, values: Mapping[str, Value]) -> None:
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str):
            raise self.damaged("is a GGUF file that does not say of what (general.architecture is missing)", OURS)
        if architecture != ARCHITECTURE:
            raise self.damaged(f"is a {printable(architecture, 40)} GGUF, not a BAGEL one", OURS)
        parts = values.get("split.count")
        if isinstance(parts, int) and parts > 1:
            raise self.damaged(f"is one of {parts} parts", "put them together with llama.cpp's `gguf-split --merge`")

    def _tensors(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Shape, type and place of each."""
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.text()
            if not name or len(name) > MAX_NAME or name in found:
                what = "appears twice" if name in found else f"is no name of 1 to {MAX_NAME} characters"
                raise self.damaged(f"tensor {name[:MAX_NAME]!r} {what}")
            dimensions = self.number("<I")
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise self.damaged(f"tensor {name}: has {dimensions} sizes, not 1 to {MAX_DIMENSIONS}")
            sizes = [self.number("<Q") for _ in range(dimensions)]
            found[name] = tuple(reversed(sizes)), self.number("<I"), self.number("<Q")
        return found

    def _entry(
        self, name: str, shape: tuple[int, ...], kind: int, offset: int, alignment: int, data: int
    ) -> TensorEntry:
        dtype = KINDS.get(kind)
        if dtype is None:
            read = ", ".join(KINDS.values())
            raise self.damaged(
                f"tensor {name} is {OTHER_TYPES.get(kind, f'of type {kind}')}, and {read} are read",
                "make the file anew in one of these",
            )
        if math.prod(shape) > 1 << 48:
            raise self.damaged(f"tensor {name}: has impossible sizes")
        block = BLOCK_TYPES.get(dtype)
        if block is not None and shape[-1] % block.values:
            raise self.damaged(f"tensor {name}: rows of {shape[-1]} are no whole blocks of {dtype}")
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype] if block is None else block.bytes_of(shape)
        if offset % alignment:
            raise self.damaged(f"tensor {name}: its place {offset} is no multiple of {alignment}")
        if offset + nbytes > self.size - data:
            raise self.damaged(f"tensor {name}: the file ends before its data (truncated)", "download it again")
        return TensorEntry(name, dtype, shape, data + offset, nbytes)
