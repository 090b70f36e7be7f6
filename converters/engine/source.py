"""The checkpoint being converted: checked against the tensor table, read tensor by tensor, watched for changes.

Tensors are read with `pread` into private memory. A memory map would cost nothing in RAM either, but a file that
shrinks under a map kills the process with SIGBUS, where a short read is an error that names the tensor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.manifest import file_sha256
from lowmem_bagel.checkpoint.safetensors_file import torch_dtype
from lowmem_bagel.checkpoint.tensors import TensorSpec, tensor_table
from lowmem_bagel.errors import CheckpointError, ConversionError

from .base import SourceTensor, Unit

if TYPE_CHECKING:
    from torch import Tensor

READ_BYTES = 8 << 20
COPIED_FILES = (
    "config.json", "llm_config.json", "vit_config.json", "ae_config.json", "resize_config.json",
    "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.json", "LICENSE", "NOTICE",
)  # fmt: skip
"""What a variant folder takes over as it is, where the source has it."""


class SourceCheckpoint:
    """An opened source folder, restricted to some experts. Use as a context manager.

    Attributes:
        path: the resolved folder.
        specs: the tensors to convert, in the table's order.
        copied: paths of the small files that the variant takes over.
    """

    def __init__(self, path: Path, experts: tuple[str, ...]) -> None:
        """Open and check names, shapes and dtypes; no tensor is read.

        Raises:
            CheckpointError, ConfigError: the folder is damaged or incomplete.
            ConversionError: it is a variant already, or its dtype is not bf16.
        """
        self.path = path.expanduser().resolve()
        folder = ModelFolder.open(self.path)
        if folder.format != "source":
            raise ConversionError(f"{path}: is a {folder.format} folder already; convert from the bf16 checkpoint")
        self.specs = tuple(s for s in tensor_table(folder.config).values() if _belongs(s, experts))
        self._entries = {spec.name: folder.entry(spec.name) for spec in self.specs}
        made = next((spec.name for spec in self.specs if not folder.stored[spec.name].as_it_is), None)
        if made is not None:
            raise ConversionError(
                f"{path}: tensor {made} is not stored as it is used, which conversion cannot read yet"
            )
        for spec in self.specs:
            self._check(spec)
        self.copied = tuple(p for name in COPIED_FILES if (p := self.path / name).is_file())
        self._open = ExitStack()
        paths = {spec.name: folder.stored[spec.name].file.path for spec in self.specs}
        self._files = {path: _File(path) for path in sorted(set(paths.values()))}
        for file in self._files.values():
            self._open.callback(file.close)
        self._file_of = {name: self._files[path] for name, path in paths.items()}
        self._stamps = {path: _stamp(path) for path in self._files}

    def __enter__(self) -> SourceCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def nbytes(self, spec: TensorSpec) -> int:
        return self._entries[spec.name].nbytes

    def dtype(self, spec: TensorSpec) -> str:
        return self._entries[spec.name].dtype

    def shape(self, spec: TensorSpec) -> tuple[int, ...]:
        return self._entries[spec.name].shape

    def fingerprint(self) -> dict[str, Any]:
        """What an interrupted conversion's work is valid for.

        Sizes, modification times and headers of the shards, and the small files' hashes. The data itself (29 GB) is
        hashed while it is converted; that hash is in the manifest.
        """
        shards = {
            path.name: {"bytes": size, "mtime_ns": mtime, "header": _header_sha256(self._files[path])}
            for path, (size, mtime, _) in self._stamps.items()
        }
        return {"shards": shards, "files": {path.name: file_sha256(path) for path in self.copied}}

    def check_unchanged(self) -> None:
        """Raises ConversionError where a shard is not the file that was opened any more."""
        for path, stamp in self._stamps.items():
            try:
                now = _stamp(path)
            except OSError as error:
                raise ConversionError(f"{path}: gone while it was converted ({error.strerror})") from error
            if now != stamp:
                raise ConversionError(f"{path}: changed while it was converted; start again with --restart")

    def stream(self, units: Iterable[Unit]) -> Iterator[list[SourceTensor]]:
        """Units' tensors in order; the next unit is read and hashed while the caller works on the present one."""
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
            pending = None
            try:
                for unit in units:
                    following = pool.submit(self._read_unit, unit)
                    if pending is not None:
                        yield pending.result()
                    pending = following
                if pending is not None:
                    yield pending.result()
            finally:
                if pending is not None:
                    pending.cancel()

    def _read_unit(self, unit: Unit) -> list[SourceTensor]:
        return [self._read(spec) for spec in unit.specs]

    def _read(self, spec: TensorSpec) -> SourceTensor:
        import torch

        entry = self._entries[spec.name]
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        digest = hashlib.sha256()
        for start in range(0, entry.nbytes, READ_BYTES):
            part = data[start : start + READ_BYTES]
            self._read_into(spec.name, start, part)
            digest.update(part.numpy().data)
        shaped = data.view(torch_dtype(entry.dtype)).view(entry.shape)
        return SourceTensor(spec, entry.dtype, entry.shape, shaped, digest.hexdigest())

    def _read_into(self, name: str, start: int, out: Tensor) -> None:
        entry, file = self._entries[name], self._file_of[name]
        view = out.numpy().data
        try:
            count = file.read_into(view, entry.start + start)
        except OSError as error:
            raise ConversionError(f"{file.path}: tensor {name} cannot be read ({error.strerror or error})") from error
        if count < len(view):
            raise ConversionError(f"{file.path}: became shorter while tensor {name} was read; restore the file")

    def _check(self, spec: TensorSpec) -> None:
        entry = self._entries[spec.name]
        fits = len(entry.shape) == len(spec.shape) and all(
            want in (None, have) for want, have in zip(spec.shape, entry.shape, strict=True)
        )
        if not fits or not entry.nbytes:
            raise CheckpointError(
                f"{self.path}: tensor {spec.name} has the shape {list(entry.shape)}, and the configuration says "
                f"{['any' if n is None else n for n in spec.shape]}; download the folder again"
            )
        allowed = ("F32", "BF16", "F16") if spec.part == "vae" else ("BF16",)  # the VAE is kept as it is
        if entry.dtype not in allowed:
            raise ConversionError(
                f"{self.path}: tensor {spec.name} is {entry.dtype}, and conversion starts from {' or '.join(allowed)}; "
                "use the bf16 checkpoint"
            )


def _belongs(spec: TensorSpec, experts: tuple[str, ...]) -> bool:
    """A checkpoint without the generating expert has no use for latents and VAE either."""
    if spec.expert is not None:
        return spec.expert in experts
    return "gen" in experts or spec.part not in ("latent", "vae")


def _stamp(path: Path) -> tuple[int, int, int]:
    info = path.stat()
    return info.st_size, info.st_mtime_ns, info.st_ino


class _File:
    """A file read by position, from more than one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._seeking = Lock()

    def close(self) -> None:
        os.close(self._descriptor)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view`; the number of bytes read, fewer than its length only at the end of the file."""
        done = 0
        while done < len(view) and (count := self._read_some(view[done:], offset + done)):
            done += count
        return done

    def read(self, count: int, offset: int) -> bytes:
        data = bytearray(count)
        return bytes(data[: self.read_into(memoryview(data), offset)])

    def _read_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], offset)
        with self._seeking:  # Windows has no positional read
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, len(view))
        view[: len(data)] = data
        return len(data)


def _header_sha256(file: _File) -> str:
    length = int.from_bytes(file.read(8, 0), "little")
    return hashlib.sha256(file.read(length, 8)).hexdigest()
