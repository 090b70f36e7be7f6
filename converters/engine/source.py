"""The checkpoint being converted: checked against the tensor table, read tensor by tensor, watched for changes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.naming import FLOATS
from lowmem_bagel.checkpoint.tensors import TensorSpec, tensor_table
from lowmem_bagel.errors import CheckpointError, ConversionError

from .base import SourceTensor, Unit
from .disk import DirectFile
from .phases import Phases
from .reading import SMALL_BYTES, Reader
from .room import Room


class SourceCheckpoint:
    """An opened source folder, restricted to some experts. Use as a context manager.

    Attributes:
        path: the resolved folder.
        specs: the tensors to convert, in the table's order.
        copied: the small files that the variant takes over, name -> content.
        options: what the variant's manifest says of the source beside the converter's options.
    """

    def __init__(
        self,
        path: Path,
        experts: tuple[str, ...],
        *,
        as_stored: Callable[[TensorSpec], bool] = lambda _: False,
        weights: str | None = None,
        base: Path | None = None,
        lora: Sequence[str] = (),
    ) -> None:
        """Open and check names, shapes and dtypes; no tensor is read.

        Args:
            as_stored: which tensors are read in their own dtype. Of the others what is not bf16 is rounded to it, the
                VAE aside.
            weights, base, lora: as for `ModelFolder.open`.

        Raises:
            CheckpointError, ConfigError: the folder is damaged or incomplete.
            ConversionError: it is a variant already, or its dtype is none that can be read.
        """
        folder = ModelFolder.open(path, weights=weights, base=base, lora=lora)
        if folder.format != "source":
            raise ConversionError(f"{path}: is a {folder.format} folder already; convert from the checkpoint itself")
        self.path = folder.path.resolve()
        self._as_stored = as_stored
        self._adapters = folder.adapters
        self.specs = tuple(s for s in tensor_table(folder.config).values() if _belongs(s, experts))
        self._stored = {spec.name: folder.located(spec.name) for spec in self.specs}
        for spec in self.specs:
            self._check(spec)
        companions = folder.companions()
        self.copied = {
            name: found if isinstance(found, bytes) else found.read_bytes() for name, found in companions.items()
        }
        self._open = ExitStack()
        self._room = Room()
        paths = {piece.file.path for stored in self._stored.values() for piece in stored.pieces}
        self._headers = {p.file.path: p.file.header_bytes for stored in self._stored.values() for p in stored.pieces}
        self._files = {path: DirectFile(path) for path in sorted(paths)}
        for file in self._files.values():
            self._open.callback(file.close)
        self._stamps = {path: _stamp(path) for path in self._files}
        self._stamps_of_small = {path: _stamp(path) for path in companions.values() if isinstance(path, Path)}

    def __enter__(self) -> SourceCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def options(self) -> dict[str, str]:
        return {"lora": ", ".join(adapter.said for adapter in self._adapters)} if self._adapters else {}

    @property
    def places(self) -> set[Path]:
        """Every folder that something is read from."""
        return {self.path, *(path.resolve().parent for path in self._files)}

    def rounds(self, spec: TensorSpec) -> bool:
        """Whether a tensor is rounded as it is read."""
        return not self._as_stored(spec) and spec.part != "vae" and self._stored[spec.name].entry.dtype != "BF16"

    def nbytes(self, spec: TensorSpec) -> int:
        """Bytes of a tensor once it was read."""
        return 2 * math.prod(self.shape(spec)) if self.rounds(spec) else self._stored[spec.name].entry.nbytes

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        return self._stored[spec.name].entry.shape

    def dtype(self, spec: TensorSpec) -> str:
        """A tensor's dtype once it was read, by safetensors' name."""
        return "BF16" if self.rounds(spec) else self._stored[spec.name].entry.dtype

    def fingerprint(self) -> dict[str, Any]:
        """What an interrupted conversion's work is valid for.

        Sizes, modification times and headers of the shards, and the small files' hashes. The data itself (29 GB) is
        hashed while it is converted; that hash is in the manifest.
        """
        shards = {
            self._called(path): {"bytes": size, "mtime_ns": mtime, "header": self._header_sha256(path)}
            for path, (size, mtime, _) in self._stamps.items()
        }
        found = {
            "shards": shards,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in self.copied.items()},
        }
        if self._adapters:
            scales = [{name: change.scale for name, change in a.changes.items()} for a in self._adapters]
            found["adapters"] = scales  # their files are among the shards
        return found

    def _header_sha256(self, path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.sha256(file.read(self._headers[path])).hexdigest()

    def _called(self, path: Path) -> str:
        """A file's name; its path where that lies elsewhere, as a base's."""
        return path.name if path.resolve().parent == self.path else str(path.resolve())

    def check_unchanged(self) -> None:
        """Raises ConversionError where a file is not the one that was opened any more."""
        for path, stamp in (*self._stamps.items(), *self._stamps_of_small.items()):
            try:
                now = _stamp(path)
            except OSError as error:
                raise ConversionError(f"{path}: gone while it was converted ({error.strerror})") from error
            if now != stamp:
                raise ConversionError(f"{path}: changed while it was converted; start again with --restart")

    def stream(
        self, units: Iterable[Unit], phases: Phases, wait_for_room: Callable[[int], None] = lambda nbytes: None
    ) -> Generator[list[SourceTensor], None, None]:
        """Units' tensors in order; the next unit is read and hashed while the caller works on the present one.

        `wait_for_room` is called with a unit's size before memory is taken for it, on the reading thread.
        """
        with (
            ThreadPoolExecutor(1, thread_name_prefix="source-hash") as hashing,
            ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reading,
        ):
            reader = Reader(self._files, self._room, phases, hashing)

            def read(units: list[Unit]) -> list[list[SourceTensor]]:
                wait_for_room(sum(map(self._size, units)))
                waiting = [
                    [reader.read(spec, self._stored[spec.name], self.rounds(spec)) for spec in unit.specs]
                    for unit in units
                ]
                return [[wait() for wait in unit] for unit in waiting]

            pending = None
            try:
                for together in self._small_together(units):
                    following = reading.submit(read, together)
                    if pending is not None:
                        yield from pending.result()
                    pending = following
                if pending is not None:
                    yield from pending.result()
            finally:
                if pending is not None:
                    pending.cancel()

    def _size(self, unit: Unit) -> int:
        return sum(map(self.nbytes, unit.specs))

    def _small_together(self, units: Iterable[Unit]) -> Iterator[list[Unit]]:
        """Units in order; small ones in groups, because a thread takes longer to hear of one than to read it."""
        together: list[Unit] = []
        for unit in units:
            small = self._size(unit) < SMALL_BYTES
            if together and not (small and sum(map(self._size, together)) < SMALL_BYTES):
                yield together
                together = []
            together.append(unit)
        if together:
            yield together

    def _check(self, spec: TensorSpec) -> None:
        entry = self._stored[spec.name].entry
        fits = len(entry.shape) == len(spec.shape) and all(
            want in (None, have) for want, have in zip(spec.shape, entry.shape, strict=True)
        )
        if not fits or not entry.nbytes:
            wanted = ["any" if size is None else size for size in spec.shape]
            raise CheckpointError(
                f"{self.path}: tensor {spec.name} has the shape {list(entry.shape)}, and the configuration says "
                f"{wanted}; the checkpoint does not belong to its configuration"
            )
        if entry.dtype not in FLOATS:
            raise ConversionError(
                f"{self.path}: tensor {spec.name} is {entry.dtype}, and conversion starts from {', '.join(FLOATS)} or "
                "FP8; use such a checkpoint"
            )


def _belongs(spec: TensorSpec, experts: tuple[str, ...]) -> bool:
    """A checkpoint without the generating expert has no use for latents and VAE either."""
    if spec.expert is not None:
        return spec.expert in experts
    return "gen" in experts or spec.part not in ("latent", "vae")


def _stamp(path: Path) -> tuple[int, int, int]:
    info = path.stat()
    return info.st_size, info.st_mtime_ns, info.st_ino
