"""The checkpoint being converted: checked against the tensor table, read tensor by tensor, watched for changes.

Tensors are read into private memory. A memory map would cost nothing in RAM either, but a file that
shrinks under a map kills the process with SIGBUS, where a short read is an error that names the tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.checkpoint.manifest import file_sha256
from lowmem_bagel.checkpoint.safetensors_file import torch_dtype
from lowmem_bagel.checkpoint.tensors import TensorSpec, tensor_table
from lowmem_bagel.errors import CheckpointError, ConversionError
from lowmem_bagel.files import expanded

from .base import SourceTensor, Unit
from .disk import PAGE_BYTES, DirectFile
from .phases import READ, SOURCE_HASH, Phases
from .room import Room
from .shards import tensor_bytes

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

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
        self.path = expanded(path).resolve()
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
        self._room = Room()
        paths = {spec.name: folder.stored[spec.name].file.path for spec in self.specs}
        self._files = {path: DirectFile(path) for path in sorted(set(paths.values()))}
        for file in self._files.values():
            self._open.callback(file.close)
        self._file_of = {name: self._files[path] for name, path in paths.items()}
        self._stamps = {path: _stamp(path) for path in self._files}
        self._small_stamps = {path: _stamp(path) for path in self.copied}

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
            path.name: {"bytes": size, "mtime_ns": mtime, "header": _header_sha256(path)}
            for path, (size, mtime, _) in self._stamps.items()
        }
        return {"shards": shards, "files": {path.name: file_sha256(path) for path in self.copied}}

    def check_unchanged(self) -> None:
        """Raises ConversionError where a file is not the one that was opened any more."""
        for path, stamp in (*self._stamps.items(), *self._small_stamps.items()):
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

            def read(unit: Unit) -> list[SourceTensor]:
                wait_for_room(sum(map(self.nbytes, unit.specs)))
                return [hashed() for hashed in [self._read(spec, phases, hashing) for spec in unit.specs]]

            pending = None
            try:
                for unit in units:
                    following = reading.submit(read, unit)
                    if pending is not None:
                        yield pending.result()
                    pending = following
                if pending is not None:
                    yield pending.result()
            finally:
                if pending is not None:
                    pending.cancel()

    def _read(self, spec: TensorSpec, phases: Phases, hashing: Executor) -> Callable[[], SourceTensor]:
        """Read a tensor; another thread hashes each piece while the next one is read. What is returned waits for it."""
        entry, dtype = self._entries[spec.name], torch_dtype(self._entries[spec.name].dtype)
        before = entry.start % PAGE_BYTES  # so that pieces begin with a page, in the file as in memory
        size = before + entry.nbytes
        space = self._room.empty((-(-size // PAGE_BYTES) * PAGE_BYTES,), torch_dtype("U8"))
        view, digest, done = tensor_bytes(space), hashlib.sha256(), []
        for start in range(0, size, READ_BYTES):
            end = min(start + READ_BYTES, size)
            with phases(READ):
                self._read_into(spec.name, entry.start - before + start, view[start : start + READ_BYTES], end - start)
            done.append(hashing.submit(_update, digest, view[max(start, before) : end], phases))
        data = space[before:size]
        if before % dtype.itemsize:
            data = data.clone()

        def hashed() -> SourceTensor:
            for part in done:
                part.result()
            shaped = data.view(dtype).view(entry.shape)
            return SourceTensor(spec, entry.dtype, entry.shape, shaped, digest.hexdigest(), self._room.empty)

        return hashed

    def _read_into(self, name: str, offset: int, view: memoryview, least: int) -> None:
        """Fill `view` from a tensor's file, or as much of it as the file has, but `least` bytes."""
        file = self._file_of[name]
        try:
            count = file.read_into(view, offset)
        except OSError as error:
            raise ConversionError(f"{file.path}: tensor {name} cannot be read ({error.strerror or error})") from error
        if count < least:
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


def _update(digest: Hash, part: memoryview, phases: Phases) -> None:
    with phases(SOURCE_HASH):
        digest.update(part)


def _header_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(int.from_bytes(file.read(8), "little"))).hexdigest()
