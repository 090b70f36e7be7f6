"""Checking a variant folder: its checksums, and against the source that it was made from.

Checksums show damage since the conversion. The comparison with the source restores every tensor as the runtime will
see it: what is kept or lossless must have the source's bits, what is lossy at most the recorded error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..files import expanded
from .folder import ModelFolder
from .manifest import ROUNDING, Manifest, StoredFile, TensorRecord, file_sha256, source_digest
from .safetensors_file import torch_dtype
from .tensors import tensor_table

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 18
ERROR_MARGIN = 1e-3
"""Relative room between two measurements of one error: sums in another precision or order."""

KEPT = ("bf16", "fp16", "fp32")
"""Encodings that are stored as they are seen; fp16 may be the VAE's own dtype or what the fp16 format made."""

Report = Callable[[int, int, str], None]
"""(bytes done, bytes in all, what is checked)"""


@dataclass(frozen=True)
class Verification:
    """What was checked, and every problem found, one line each.

    `compared` counts the tensors compared with the source and `exact` those of them with equal bits;
    `largest_error` is the largest relative L2 error met.
    """

    files: int
    tensors: int
    bytes: int
    compared: int
    exact: int
    largest_error: float
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems


def verify(folder: Path, source: Path | ModelFolder | None = None, report: Report | None = None) -> Verification:
    """Check a variant folder, against its source too where one is given, as a folder or opened.

    Returns:
        the problems that single files and tensors have; a folder without any has passed.

    Raises:
        CheckpointError, ConfigError: the folder or the source cannot be opened at all, or has no manifest.
    """
    folder = expanded(folder)
    variant = ModelFolder.open(folder)
    manifest = variant.manifest
    if manifest is None:
        raise CheckpointError(f"{folder}: has no variant.json, so there are no checksums; verify a converted folder")
    restore = _restorer(folder, manifest)
    original = source if isinstance(source, ModelFolder | None) else ModelFolder.open(source)
    check = _Check(variant, manifest, original, report)
    check.files()
    check.tensors()
    if original is not None:
        check.against(original, restore)
    return check.result()


class _Check:
    def __init__(
        self, variant: ModelFolder, manifest: Manifest, original: ModelFolder | None, report: Report | None
    ) -> None:
        self.variant, self.manifest = variant, manifest
        self.problems: list[str] = []
        self.compared = self.exact = 0
        self.largest_error = 0.0
        self.done, self.report = 0, report
        stored = [*manifest.shards.values(), *manifest.files.values()]
        records = manifest.tensors.values()
        self.total = sum(file.bytes for file in stored) + sum(r.bytes for r in records) * (2 if original else 1)

    def files(self) -> None:
        for file in (*self.manifest.shards.values(), *self.manifest.files.values()):
            self._file(file)

    def tensors(self) -> None:
        """Names, shapes and hashes of what the records refer to; nothing may be stored beside it."""
        table = tensor_table(self.variant.config)
        known = {name for record in self.manifest.tensors.values() for name in record.stored}
        self.problems += [
            f"tensor {name}: stored, and not in variant.json" for name in self.variant.stored.keys() - known
        ]
        for record in self.manifest.tensors.values():
            if record.name not in table:
                self.problems.append(f"tensor {record.name}: not a tensor of a checkpoint with this configuration")
            if self._present(record) and self._hash(record) != record.sha256:
                self.problems.append(f"tensor {record.name}: its data is damaged")
            self._tell(record.bytes, record.name)

    def against(self, original: ModelFolder, restore: Any) -> None:
        for record in self.manifest.tensors.values():
            problem = self._compare(record, original, restore) if self._present(record, quiet=True) else None
            if problem:
                self.problems.append(f"tensor {record.name}: {problem}")
            self._tell(record.bytes, record.name)
        if source_digest(self.manifest.tensors.values()) != self.manifest.source_sha256:
            self.problems.append("variant.json: the source's hash is not that of its tensors")

    def result(self) -> Verification:
        manifest = self.manifest
        return Verification(
            files=len(manifest.shards) + len(manifest.files),
            tensors=len(manifest.tensors),
            bytes=sum(shard.bytes for shard in manifest.shards.values()),
            compared=self.compared,
            exact=self.exact,
            largest_error=self.largest_error,
            problems=tuple(self.problems),
        )

    def _file(self, file: StoredFile) -> None:
        path = self.variant.path / file.name
        try:
            size = path.stat().st_size
            if size != file.bytes:
                self.problems.append(f"{file.name}: {size} bytes where {file.bytes} belong")
            elif file_sha256(path, lambda count: self._tell(count, file.name)) != file.sha256:
                self.problems.append(f"{file.name}: its data is damaged")
        except OSError as error:
            self.problems.append(f"{file.name}: cannot be read ({error.strerror or error})")

    def _present(self, record: TensorRecord, quiet: bool = False) -> bool:
        entries = [self.variant.stored.get(name) for name in record.stored]
        problem = None
        if not all(e is not None and e.file.path.name == record.file for e in entries):
            problem = f"not in {record.file}"
        elif sum(e.entry.nbytes for e in entries if e is not None) != record.bytes:
            problem = "stored with another size than recorded"
        if problem and not quiet:
            self.problems.append(f"tensor {record.name}: {problem}")
        return problem is None

    def _hash(self, record: TensorRecord) -> str:
        digest = hashlib.sha256()
        for name in record.stored:
            digest.update(self.variant.raw(name))
        return digest.hexdigest()

    def _compare(self, record: TensorRecord, original: ModelFolder, restore: Any) -> str | None:
        if record.name not in original.stored:
            return "the source does not have it"
        entry = original.entry(record.name)
        if (entry.dtype, entry.shape) != (record.dtype, record.shape):
            return f"the source has {entry.dtype} {list(entry.shape)}: not what this folder was made from"
        if hashlib.sha256(original.raw(record.name)).hexdigest() != record.source_sha256:
            return "the source's data is not what this folder was made from"
        self.compared += 1
        stored = {name: self.variant.tensor(name).clone() for name in record.stored}
        try:
            value = restore(record, stored)
        except CheckpointError as error:
            return str(error)
        want = original.tensor(record.name)
        rounding = record.errors.get(ROUNDING)
        if rounding is not None:  # of a source that is not bf16: what counts is what loading makes of it
            want = want.to(torch_dtype("BF16"))
            self.largest_error = max(self.largest_error, rounding)
        if value.shape != want.shape:
            return f"restores to the shape {list(value.shape)}, and {list(want.shape)} is recorded"
        if value.dtype == want.dtype and same_bits(value, want):
            self.exact += not rounding
            return None
        error_now = relative_l2(value, want)
        self.largest_error = max(self.largest_error, error_now)
        recorded = record.errors.get("weight_rel_l2", 0.0)
        if error_now > recorded * (1 + ERROR_MARGIN):
            return f"its error against the source is {error_now:.3g}, and at most {recorded:.3g} is recorded"
        return None

    def _tell(self, count: int, now: str) -> None:
        self.done += count
        if self.report is not None:
            self.report(self.done, self.total, now)


def relative_l2(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| of two tensors of one shape, in float32 pieces whose norms are added in
    float64; 0 where they are equal, infinity where one of them has no finite norm.

    `ops.errors.relative_l2` for tensors as large as an embedding, and for a room that imports no arithmetic.
    """
    import torch

    difference = norm = 0.0
    for got, want in _pieces(value, reference):
        exact = want.to(torch.float32)
        difference += float(torch.linalg.vector_norm(got.to(torch.float32) - exact)) ** 2
        norm += float(torch.linalg.vector_norm(exact)) ** 2
    if difference == 0:
        return 0.0
    ratio = difference / norm if norm else math.inf
    return math.sqrt(ratio) if math.isfinite(ratio) else math.inf


def same_bits(value: Tensor, reference: Tensor) -> bool:
    """Whether two tensors of one shape and dtype have equal bits (NaN equals itself, and -0 is not 0)."""
    import torch

    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return all(torch.equal(got.view(bits), want.view(bits)) for got, want in _pieces(value, reference))


def _pieces(value: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat pieces of both, so small that what is computed from them stays in the CPU's cache."""
    a, b = value.reshape(-1), reference.reshape(-1)
    for start in range(0, a.numel(), PIECE):
        yield a[start : start + PIECE], b[start : start + PIECE]


def _restorer(folder: Path, manifest: Manifest) -> Any:
    """restore(record, stored) -> tensor: the format's own inverse, found as an installed converter."""
    points = tuple(entry_points(group="lowmem_bagel.converters", name=manifest.format))
    restore = getattr(points[0].load(), "restore", None) if points else None
    if restore is None:  # none of that name, or one that makes several formats and is none itself
        raise CheckpointError(
            f"{folder}: no installed converter knows the format {manifest.format}; upgrade lowmem-bagel"
        )

    def restored(record: TensorRecord, stored: dict[str, Tensor]) -> Tensor:
        if record.encoding in KEPT:
            return stored[record.stored[0]]
        tensor: Tensor = restore(record, stored)
        return tensor

    return restored
