"""`variant.json`, the manifest of a variant folder: what is in it, how it was made, and how exact it is.

The manifest is what a variant is judged by before any weight is read, so reading it is total: whatever the bytes
are, the answer is a `Manifest` whose parts agree with each other, or a `CheckpointError`. Writing is deterministic:
equal manifests give equal bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError
from ..files import open_file, parse_json, read_file

MANIFEST_NAME = "variant.json"
MANIFEST_VERSION = 1
EXPERTS = ("und", "gen")
ROUNDING = "rounding_rel_l2"
"""The error of a tensor that was rounded to bf16 before anything else was done with it; other errors are against what
came of that."""
READ_BYTES = 8 << 20

Option = bool | int | float | str
"""A value in `options`: what a JSON scalar can hold."""

_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. +-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_BYTES = 1 << 50


@dataclass(frozen=True)
class StoredFile:
    """A file of the folder. `name` has no path in it."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """How one tensor of the checkpoint is kept.

    `encoding` is this tensor's own: "bf16", "fp32", "int8"...; `dtype` (a safetensors name) and `shape` are the
    source's. `stored` names the tensors that hold it, all in shard `file`; `bytes` is their sum, and `sha256` is over
    their bytes in that order. `source_sha256` is over the source's bytes. `errors` are measured against the source
    (`weight_rel_l2`, `output_rel_l2`, ...); without loss it is empty. `options` are what decoding needs beyond the
    stored tensors (`rotation_group`).
    """

    name: str
    encoding: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    stored: tuple[str, ...]
    bytes: int
    sha256: str
    source_sha256: str
    errors: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


_Row = TypeVar("_Row", StoredFile, TensorRecord)


@dataclass(frozen=True)
class Manifest:
    """A variant folder. Shards, other files and tensors are by name, in the order of the folder's data.

    `source_sha256` is `source_digest` of the records, so it does not depend on how the source was sharded.
    """

    format: str
    format_version: int
    tool_version: str
    experts: tuple[str, ...]
    options: Mapping[str, Option]
    source: str
    source_sha256: str
    shards: Mapping[str, StoredFile]
    files: Mapping[str, StoredFile]
    tensors: Mapping[str, TensorRecord]
    manifest_version: int = MANIFEST_VERSION

    def to_json(self) -> bytes:
        """Deterministic text, one line a record, so that two manifests can be compared by `diff`."""
        tables = ("shards", "files", "tensors")
        head = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in tables}
        lines = [f" {json.dumps(key)}: {_compact(value)}" for key, value in head.items()]
        for key in tables:
            rows = ",\n".join(f"  {_compact(vars(row))}" for row in getattr(self, key).values())
            lines.append(f' "{key}": [\n{rows}\n ]')
        return ("{\n" + ",\n".join(lines) + "\n}\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str = MANIFEST_NAME) -> Manifest:
        """Parse and validate.

        Raises:
            CheckpointError: anything that is not a manifest whose parts agree.
        """
        try:
            values = parse_json(data)
        except ValueError as error:
            raise CheckpointError(f"{where}: damaged ({error}); convert the checkpoint again") from error
        return _manifest(_Fields(where, "", values))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`, or None where it has none (a source checkpoint).

    Only `variant.json` is read: whether the files that it names are there is for `verify`.

    Raises:
        CheckpointError: unreadable, malformed or contradictory.
    """
    path = folder / MANIFEST_NAME
    try:
        data = read_file(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return Manifest.from_json(data, str(path))


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read in pieces; `progress` gets the bytes of each. OSError passes through."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def source_digest(records: Iterable[TensorRecord]) -> str:
    """One hash for the source's tensors: over name, dtype, shape and data hash of each, in order of name.

    The same checkpoint in one file or in many has the same digest; `--experts und` covers only what was kept.
    """
    lines = sorted(f"{r.name} {r.dtype} {list(r.shape)} {r.source_sha256}\n" for r in records)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


# Validation --------------------------------------------------------------------------------------------------------


@cache
def _names_of(kind: type) -> frozenset[str]:
    """Of its fields; asked for once a tensor."""
    return frozenset(field.name for field in dataclasses.fields(kind))


class _Fields:
    """Typed reading of one JSON object; every complaint names the file and the place in it."""

    def __init__(self, where: str, place: str, values: object) -> None:
        self.where, self.place = where, place
        if not isinstance(values, dict):
            raise self.wrong("", "an object")
        self.values: dict[str, Any] = values

    def wrong(self, key: str, wanted: str) -> CheckpointError:
        at = ".".join(part for part in (self.place, key) if part) or "the file"
        return CheckpointError(f"{self.where}: {at} must be {wanted}; convert the checkpoint again")

    def only(self, kind: type) -> None:
        unknown = self.values.keys() - _names_of(kind)
        if unknown:
            raise self.wrong(min(unknown)[:60], "absent: this version of lowmem-bagel does not know it")

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.values.get(key)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def text(self, key: str, pattern: re.Pattern[str] | None = None, limit: int = 300) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not _is_name(value, limit):
            raise self.wrong(key, f"a text of 1 to {limit} characters")
        if pattern is not None and not pattern.fullmatch(value):
            raise self.wrong(key, "a SHA-256 in hex" if pattern is _SHA256 else f"of the form {pattern.pattern}")
        return value

    def file_name(self, key: str) -> str:
        value = self.text(key, _FILE_NAME)
        if value.endswith((".", " ")) or value == MANIFEST_NAME:
            raise self.wrong(key, "a plain file name")
        return value

    def table(self, key: str, read: Callable[[_Fields], _Row]) -> dict[str, _Row]:
        rows = self.values.get(key)
        if not isinstance(rows, list):
            raise self.wrong(key, "a list")
        table: dict[str, _Row] = {}
        for i, values in enumerate(rows):
            row = read(_Fields(self.where, f"{key}[{i}]", values))
            if row.name in table:
                raise self.wrong(f"{key}[{i}].name", f"unique, and {row.name} appears twice")
            table[row.name] = row
        return table

    def texts(self, key: str) -> tuple[str, ...]:
        rows = self.values.get(key)
        if not isinstance(rows, list) or not all(_is_name(r) for r in rows):
            raise self.wrong(key, "a list of names")
        return tuple(rows)

    def errors(self, key: str) -> dict[str, float]:
        values = self._mapping(key)
        if not all(type(v) in (int, float) and 0 <= v < 1e30 for v in values.values()):
            raise self.wrong(key, "an object of non-negative numbers")
        return {name: float(value) for name, value in values.items()}

    def options(self, key: str) -> dict[str, Option]:
        values = self._mapping(key)
        for value in values.values():
            number = type(value) in (int, float) and abs(value) < 1e30
            if not (isinstance(value, bool) or number or (isinstance(value, str) and len(value) <= 300)):
                raise self.wrong(key, "an object of scalars")
        return values

    def _mapping(self, key: str) -> dict[str, Any]:
        values = self.values.get(key)
        if not isinstance(values, dict) or not all(_IDENTIFIER.fullmatch(name) for name in values):
            raise self.wrong(key, "an object with plain names")
        return values


def _manifest(fields: _Fields) -> Manifest:
    version = fields.integer("manifest_version", 1, 1 << 30)
    if version != MANIFEST_VERSION:
        raise CheckpointError(
            f"{fields.where}: manifest version {version}, and this lowmem-bagel reads {MANIFEST_VERSION}; upgrade it"
        )
    fields.only(Manifest)
    experts = fields.texts("experts")
    if not experts or experts != tuple(e for e in EXPERTS if e in experts):
        raise fields.wrong("experts", 'one of ["und"], ["gen"] or ["und", "gen"]')
    manifest = Manifest(
        format=fields.text("format", _IDENTIFIER),
        format_version=fields.integer("format_version", 1, 1 << 30),
        tool_version=fields.text("tool_version"),
        experts=experts,
        options=fields.options("options"),
        source=fields.text("source"),
        source_sha256=fields.text("source_sha256", _SHA256),
        shards=fields.table("shards", _stored_file),
        files=fields.table("files", _stored_file),
        tensors=fields.table("tensors", _tensor_record),
    )
    _check_agreement(fields, manifest)
    return manifest


def _stored_file(fields: _Fields) -> StoredFile:
    fields.only(StoredFile)
    return StoredFile(fields.file_name("name"), fields.integer("bytes", 0, _MAX_BYTES), fields.text("sha256", _SHA256))


def _tensor_record(fields: _Fields) -> TensorRecord:
    fields.only(TensorRecord)
    shape = fields.values.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > 8
        or not all(type(n) is int and 0 < n < 2**48 for n in shape)
        or math.prod(shape) > _MAX_BYTES
    ):
        raise fields.wrong("shape", "a list of sizes")
    return TensorRecord(
        name=fields.text("name"),
        encoding=fields.text("encoding", _IDENTIFIER),
        dtype=fields.text("dtype", limit=8),
        shape=tuple(shape),
        file=fields.file_name("file"),
        stored=fields.texts("stored"),
        bytes=fields.integer("bytes", 0, _MAX_BYTES),
        sha256=fields.text("sha256", _SHA256),
        source_sha256=fields.text("source_sha256", _SHA256),
        errors=fields.errors("errors"),
        options=fields.options("options"),
    )


def _check_agreement(fields: _Fields, manifest: Manifest) -> None:
    """What no single field can show: names are unique, and what a record refers to is there and can hold it."""
    # Names that differ in case alone would be one file on some file systems.
    _unique(fields, "shards and files", (name.lower() for name in (*manifest.shards, *manifest.files)))
    _unique(fields, "tensors' stored names", (name for r in manifest.tensors.values() for name in r.stored))
    left = {name: shard.bytes for name, shard in manifest.shards.items()}
    for record in manifest.tensors.values():
        if record.file not in left:
            raise fields.wrong(f"the file of {record.name}", "one of the shards")
        if not record.stored:
            raise fields.wrong(f"stored of {record.name}", "at least one name")
        left[record.file] -= record.bytes
        if left[record.file] < 0:
            raise fields.wrong(f"the bytes of {record.file}", "at least those of its tensors")
    if source_digest(manifest.tensors.values()) != manifest.source_sha256:
        raise fields.wrong("source_sha256", "the digest of the tensors' source hashes")


def _unique(fields: _Fields, what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise fields.wrong(what, f"without duplicates ({name[:80]})")
        seen.add(name)


def _is_name(value: object, limit: int = 300) -> bool:
    return isinstance(value, str) and 0 < len(value) <= limit and value.isprintable()
